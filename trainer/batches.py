"""Which demonstrations and rehearsal prompts stand in which step: a pure function of the seed."""

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from domain.recipe import Recipe
from trainer.methods import plan_of


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
        self._recipe = recipe
        self._rehearsal_share = share
        self._off_policy_share = recipe.off_policy_share if plan_of(recipe).responses == "student" else 1.0
        self._lessons = lessons
        self._rehearsal = rehearsal
        steps = math.ceil(recipe.num_epochs * lessons / (recipe.batch_size * (1 - share)) - 1e-9)
        steps = max(steps, recipe.min_steps)
        self._taught = min(steps, recipe.max_steps or steps)
        self.steps = self._taught + recipe.reinvoke_steps

    def batch(self, step: int) -> Batch:
        """The batch of 0-based `step`."""
        size = self._recipe.batch_size
        if step >= self._taught:
            first = self._rehearsed_before(self._taught) + (step - self._taught) * size
            return Batch((), (), self._rehearse(first, size))
        rehearsed, rehearsed_then = self._rehearsed_before(step), self._rehearsed_before(step + 1)
        rehearsal = self._rehearse(rehearsed, rehearsed_then - rehearsed)
        first, then = step * size - rehearsed, (step + 1) * size - rehearsed_then
        chosen = [self._draw("lessons", self._lessons, place) for place in range(first, then)]
        off = _part(then, self._off_policy_share) - _part(first, self._off_policy_share)
        on_policy = [lesson for lesson in chosen[off:] for _ in range(self._recipe.rollouts_per_prompt)]
        return Batch(tuple(on_policy), tuple(chosen[:off]), rehearsal)

    def learning_rate(self, step: int) -> float:
        """Rate of 0-based `step`: linear warmup, then the recipe's schedule to zero; the steps that
        reinvoke begin anew."""
        if step >= self._taught:
            return learning_rate(self._recipe, step - self._taught, self._recipe.reinvoke_steps)
        return learning_rate(self._recipe, step, self._taught)

    def _rehearsed_before(self, step: int) -> int:
        """Rehearsal prompts of the steps before 0-based `step`, of those that teach."""
        return _part(step * self._recipe.batch_size, self._rehearsal_share)

    def _rehearse(self, first: int, count: int) -> tuple[int, ...]:
        return tuple(self._draw("rehearsal", self._rehearsal, first + i) for i in range(count))

    def _draw(self, what: str, size: int, position: int) -> int:
        epoch, place = divmod(position, size)
        return _order(f"{self._recipe.seed}:{what}:{epoch}", size)[place]


def _part(count: int, share: float) -> int:
    """Of `count` in a row. Cumulative, which keeps a share exact over the run when it is not a whole number
    per step."""
    return math.floor(count * share + 1e-9)


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
