"""What a fine-tuning job asks for in OpenAI's words, and what it means here: recipe, skill, grader."""

import json
import re
from typing import Annotated, Any

from pydantic import Field, JsonValue, TypeAdapter, ValidationError, field_validator

from api.errors import invalid_input
from api.fields import Body, Name, Text
from api.routes.updates import recipe_for
from domain.errors import InvalidInput
from domain.recipe import Method, Recipe
from domain.settings import Settings
from domain.skill import NAME_PATTERN, Grader

_GRADER: TypeAdapter[Grader] = TypeAdapter(Grader)
METHODS: dict[str, Method] = {
    "sdft": "sdft",
    "supervised": "sft",
    "dft": "dft",
    "cpt": "cpt",
    "sft_reinvoke": "sft_reinvoke",
    "offline_distillation": "offline_distillation",
}
"""`method.type` -> the recipe's method."""
_NOT_OURS = frozenset({"method", "seed", "num_epochs"})
"""Fields of a recipe that have another place, or another name, in a job."""
_OPENAIS = frozenset({"n_epochs", "batch_size", "learning_rate_multiplier"})
"""Hyperparameters that may be `auto`."""

LabelKey = Annotated[Text, Field(max_length=64)]
Label = Annotated[Text, Field(max_length=512)]


class MethodOptions(Body):
    hyperparameters: Annotated[dict[str, JsonValue], Field(default_factory=dict)]


class NewJob(Body):
    model: Annotated[Text, Field(min_length=1)]
    training_file: Annotated[Text, Field(min_length=1, max_length=128)]
    validation_file: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    hyperparameters: dict[str, JsonValue] | None = None
    """The old place of what `method` now holds."""
    method: dict[str, JsonValue] | None = None
    suffix: Name | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: Annotated[dict[LabelKey, Label], Field(max_length=16)] | None = None
    integrations: list[JsonValue] | None = None

    @field_validator("integrations")
    @classmethod
    def _none(cls, integrations: list[JsonValue] | None) -> list[JsonValue] | None:
        if integrations:
            raise ValueError("not supported; the job's events and result file have its metrics")
        return integrations

    def recipe(self, settings: Settings, parameter_count: int) -> Recipe:
        """The default of a base model of that size with what the job asks for.

        Raises InvalidInput naming the field.
        """
        kind, given, under = self._asked()
        fields: dict[str, JsonValue] = {"method": METHODS[kind]}
        multiplier: float | None = None
        for name, value in given.items():
            param = f"{under}.{name}"
            if name in _NOT_OURS:
                raise InvalidInput(f"{param}: not a hyperparameter.", param=param)
            if value == "auto" and name in _OPENAIS:
                continue
            if name == "learning_rate_multiplier":
                if "learning_rate" in given:
                    raise InvalidInput(f"{param}: 'learning_rate' is given as well.", param=param)
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise InvalidInput(f"{param}: a number or 'auto'.", param=param)
                multiplier = value
            else:
                fields["num_epochs" if name == "n_epochs" else name] = value
        if self.seed is not None:
            fields["seed"] = self.seed
        if multiplier is not None:
            default = recipe_for(settings, parameter_count, fields, under=under).learning_rate
            fields["learning_rate"] = default * multiplier
        return recipe_for(settings, parameter_count, fields, under=under)

    def skill(self, filename: str, *, suffix_is_assistant: bool) -> str:
        """Name of the skill that the demonstrations go to. Raises InvalidInput for a bad `metadata.skill`."""
        named = (self.metadata or {}).get("skill")
        if named is not None:
            if not re.fullmatch(NAME_PATTERN, named):
                raise InvalidInput(
                    f"metadata.skill: '{named}' does not match {NAME_PATTERN}.", param="metadata.skill"
                )
            return named
        if self.suffix is not None and not suffix_is_assistant:
            return self.suffix
        stem = filename.rpartition(".")[0] or filename
        return re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")[:63] or "fine-tuning"

    def grader(self) -> Grader | None:
        """Of `metadata.grader`: a type, or a grader as JSON. Raises InvalidInput."""
        text = (self.metadata or {}).get("grader")
        if text is None:
            return None
        try:
            value: Any = json.loads(text) if text.lstrip().startswith("{") else {"type": text}
            return _GRADER.validate_python(value)
        except json.JSONDecodeError as error:
            raise InvalidInput(
                f"metadata.grader: not valid JSON ({error}).", param="metadata.grader"
            ) from error
        except ValidationError as error:
            raise invalid_input(error, under="metadata.grader") from error

    def _asked(self) -> tuple[str, dict[str, JsonValue], str]:
        """(method type, hyperparameters, the field in which these stand)"""
        if self.method is None:
            return "sdft", self.hyperparameters or {}, "hyperparameters"
        kind = self.method.get("type")
        if not isinstance(kind, str) or kind not in METHODS:
            raise InvalidInput(
                f"method.type: {kind!r} is not supported; one of {', '.join(METHODS)}.", param="method.type"
            )
        if self.hyperparameters:
            raise InvalidInput(f"Give hyperparameters in method.{kind} only.", param="hyperparameters")
        for name in self.method:
            if name not in ("type", kind):
                raise InvalidInput(f"method.{name}: does not belong to '{kind}'.", param=f"method.{name}")
        under = f"method.{kind}"
        try:
            options = MethodOptions.model_validate(self.method.get(kind) or {})
        except ValidationError as error:
            raise invalid_input(error, under=under) from error
        return kind, options.hyperparameters, f"{under}.hyperparameters"
