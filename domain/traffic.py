"""How the champion's traffic is shared out: canary, shadow, and what is known about each side."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from domain.skill import NAME_PATTERN
from domain.version import CHAMPION, is_reserved_alias

MOST_REQUESTS = 4096
"""Of one version that a window holds; the oldest leave first."""

Role = Literal["champion", "canary", "shadow"]
Rule = Literal["error_rate", "latency_p50", "latency_p95"]


def _other_alias(name: str) -> str:
    if name == CHAMPION:
        raise ValueError("must be another alias than 'champion'")
    if is_reserved_alias(name):
        raise ValueError("is how versions are written, not an alias")
    return name


OtherAlias = Annotated[str, Field(pattern=NAME_PATTERN), AfterValidator(_other_alias)]
Percent = Annotated[float, Field(gt=0, le=100)]


class Canary(BaseModel):
    """A share of the champion's users is answered by another alias' version, while that does well."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alias: OtherAlias = "canary"
    percent: Percent
    max_error_rate: float = Field(default=0.05, ge=0, lt=1)
    max_latency_ratio: float = Field(default=2.0, ge=1, le=100)
    """Time to the first byte, canary over champion, at the median and at the 95th percentile."""
    min_requests: int = Field(default=50, ge=1, le=MOST_REQUESTS)
    """Of a version in the window before anything is concluded."""
    window_seconds: float = Field(default=300.0, ge=1, le=86_400)
    cooldown_seconds: float = Field(default=600.0, ge=0, le=30 * 86_400)
    """After an automatic rollback no canary can be switched on for so long."""


class Shadow(BaseModel):
    """A share of the champion's requests also goes to another alias' version; nobody sees its reply."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alias: OtherAlias = "candidate"
    percent: Percent
    skill: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Whose grader judges the reply, with the champion's as the answer."""


class Traffic(BaseModel):
    """Null: none of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    canary: Canary | None = None
    shadow: Shadow | None = None


class WindowFigures(BaseModel):
    """One version's requests within the window. Seconds are to the first byte, of those that succeeded."""

    version: str
    """`v3`."""
    requests: int
    errors: int
    latency_p50: float | None
    latency_p95: float | None


class CanaryRollback(BaseModel):
    """Why the gateway took a canary's traffic away."""

    rule: Rule
    reason: str
    alias: str
    percent: float
    canary: WindowFigures
    champion: WindowFigures
