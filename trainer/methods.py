"""Each method as the few choices in which it differs on the one loop."""

from dataclasses import dataclass
from typing import Literal

from domain.recipe import Method, Recipe


@dataclass(frozen=True)
class Plan:
    """Where the tokens of a lesson come from and what they are compared with."""

    responses: Literal["student", "demonstration", "teacher", "text"]
    """student: drawn in training, but for the recipe's off-policy share. demonstration: its response.
    teacher: drawn once, before the first step, from the parent shown the demonstration. text: prompt and
    response, or the context, as one plain text."""
    loss: Literal["divergence", "cross_entropy", "dynamic"]
    """divergence: from the teacher. dynamic: cross-entropy times the token's own probability."""


_PLANS: dict[Method, Plan] = {
    "sdft": Plan("student", "divergence"),
    "sft": Plan("demonstration", "cross_entropy"),
    "dft": Plan("demonstration", "dynamic"),
    "cpt": Plan("text", "cross_entropy"),
    "sft_reinvoke": Plan("demonstration", "cross_entropy"),
    "offline_distillation": Plan("teacher", "cross_entropy"),
}


def plan_of(recipe: Recipe) -> Plan:
    if recipe.method == "offline_distillation" and recipe.offline_targets == "distribution":
        return Plan("teacher", "divergence")
    return _PLANS[recipe.method]
