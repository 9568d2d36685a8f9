"""Which demonstrations and rehearsal prompts stand in which step: a pure function of the seed."""

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from domain.recipe import Recipe


@dataclass(frozen=True)
class Batch:
    """Indices into the lessons and into the rehearsal prompts."""

    on_policy: tuple[int, ...]
    off_policy: tuple[int, ...]
    rehearsal: tuple[int, ...]


class Schedule:
    """Every step's batch. Each epoch visits each lesson once, in an order of its own."""

    def __init__(self, recipe: Recipe, lessons: int, rehearsal: int) -> None:
        """`lessons` and `rehearsal` are how many there are; without rehearsal prompts the whole batch
        is lessons."""
        share = recipe.rehearsal_share if rehearsal else 0.0
        self._rehearsal_per_step = round(recipe.batch_size * share)
        self._lessons_per_step = recipe.batch_size - self._rehearsal_per_step
        self._off_policy_share = 1.0 if recipe.method == "sft" else recipe.off_policy_share
        self._lessons = lessons
        self._rehearsal = rehearsal
        self._seed = recipe.seed
        steps = math.ceil(recipe.num_epochs * lessons / self._lessons_per_step)
        steps = max(steps, recipe.min_steps)
        self.steps = min(steps, recipe.max_steps or steps)

    def batch(self, step: int) -> Batch:
        """The batch of 0-based `step`."""
        first = step * self._lessons_per_step
        chosen = [self._draw("lessons", self._lessons, first + i) for i in range(self._lessons_per_step)]
        # Cumulative rounding keeps the share exact over the run when it is not a whole number per step.
        off = math.floor((first + self._lessons_per_step) * self._off_policy_share + 1e-9) - math.floor(
            first * self._off_policy_share + 1e-9
        )
        first = step * self._rehearsal_per_step
        rehearsal = [
            self._draw("rehearsal", self._rehearsal, first + i) for i in range(self._rehearsal_per_step)
        ]
        return Batch(tuple(chosen[off:]), tuple(chosen[:off]), tuple(rehearsal))

    def _draw(self, what: str, size: int, position: int) -> int:
        epoch, place = divmod(position, size)
        return _order(f"{self._seed}:{what}:{epoch}", size)[place]


@lru_cache(maxsize=8)
def _order(key: str, size: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(key).shuffle(order)
    return tuple(order)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Rate of 0-based `step`: linear warmup, then the recipe's schedule to zero at `steps`."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.lr_schedule == "constant":
        return recipe.learning_rate
    progress = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    if recipe.lr_schedule == "linear":
        return recipe.learning_rate * (1 - progress)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
