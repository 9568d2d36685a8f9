"""Field types that request bodies share. Unknown fields are refused by name."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from domain.skill import NAME_PATTERN


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _without_nul(text: str) -> str:
    # PostgreSQL cannot store it.
    if "\0" in text:
        raise ValueError("must not contain the character U+0000")
    return text


Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Text = Annotated[str, Field(max_length=10_000), AfterValidator(_without_nul)]
VersionRef = (
    Annotated[str, Field(max_length=64), AfterValidator(_without_nul)]
    | Annotated[int, Field(strict=True, ge=0, lt=2**31)]
)
"""`"v3"`, `3` or a version's id."""
