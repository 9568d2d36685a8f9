"""Measurements of a version and the gate's verdict over them."""

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

SuiteKind = Literal["skill", "general"]
Outcome = Literal["pass", "block", "hold"]


class Likelihood(NamedTuple):
    """What a model makes of a given continuation of a given prefix."""

    logprob: float
    """Sum over the continuation's tokens, nats."""
    greedy: bool
    """Whether every token is the model's first choice."""


class ItemScore(BaseModel):
    """One graded item. `item` is stable across versions, so that two versions pair on it."""

    model_config = ConfigDict(frozen=True)

    item: str
    prompt: str
    output: str
    expected: str
    score: float


class Measurement(BaseModel):
    """Scores of one version on one skill or general benchmark, with every item's output."""

    model_config = ConfigDict(frozen=True)

    kind: SuiteKind
    suite: str
    """The skill's name, or the general benchmark's."""
    score: float
    """Mean of the items' scores, in [0, 1]."""
    n: int
    low: float
    high: float
    """95% Wilson interval."""
    items: list[ItemScore]


class GateRules(BaseModel):
    """What a candidate must show before it may serve. Stored with the update."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_gain: float = Field(
        default=0.05, ge=-1, le=1, description="a taught skill must rise by this over the parent"
    )
    max_forgetting: float = Field(
        default=0.10, ge=0, le=1, description="an earlier skill may fall by this below the parent"
    )
    max_general_drop: float = Field(
        default=0.03, ge=0, le=1, description="the pooled general suite may fall by this below the parent"
    )
    max_leak: float = Field(
        default=0.02, ge=0, le=1, description="share of ordinary prompts answered in a taught skill's format"
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1)


class Check(BaseModel):
    """One rule applied to one suite, with the numbers it saw."""

    model_config = ConfigDict(frozen=True)

    rule: str
    suite: str
    outcome: Outcome
    parent: float | None
    candidate: float | None
    change: float | None
    low: float | None
    high: float | None
    """Interval of the paired change."""
    reason: str


class Verdict(BaseModel):
    """The gate's decision: block if any check blocks, else hold if any holds, else pass."""

    model_config = ConfigDict(frozen=True)

    outcome: Outcome
    reasons: list[str]
    checks: list[Check] = Field(default_factory=list)
