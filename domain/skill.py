"""Skills and the declaration of how their answers are graded."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
"""Names of assistants, skills and aliases: they stand in URLs and in `model` strings."""
DEFAULT_HOLDOUT_FRACTION = 0.2
"""Share of a skill's prompts that is kept for measuring and never trained on."""


class _Grader(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExactGrader(_Grader):
    """Equal to the answer after stripping outer white space."""

    type: Literal["exact"] = "exact"
    ignore_case: bool = False


class RegexGrader(_Grader):
    """The whole output matches `pattern`; with a group, group 1 of output and answer must agree."""

    type: Literal["regex"] = "regex"
    pattern: str

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern


class ContainsGrader(_Grader):
    """The answer occurs in the output, white space normalised."""

    type: Literal["contains"] = "contains"
    ignore_case: bool = True


class JsonGrader(_Grader):
    """Both parse as JSON and are equal; key order is free."""

    type: Literal["json"] = "json"


class FunctionCallGrader(_Grader):
    """One call NAME(k="v", ...): same name and arguments, values case-insensitive, order free."""

    type: Literal["function_call"] = "function_call"


class ChoiceGrader(_Grader):
    """The output's choice letter equals the answer's."""

    type: Literal["choice"] = "choice"
    choices: str = Field(default="ABCD", min_length=2, max_length=26, pattern=r"^[A-Z]+$")


Grader = Annotated[
    ExactGrader | RegexGrader | ContainsGrader | JsonGrader | FunctionCallGrader | ChoiceGrader,
    Field(discriminator="type"),
]
