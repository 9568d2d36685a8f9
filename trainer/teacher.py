"""The teacher's hidden states at response positions, and the moving average that is one of the teachers."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from domain.recipe import Recipe
from trainer.model import Model, Role
from trainer.sequences import Training, all_response_states

OWN_STATES_BYTES = 1 << 30
"""Memory for a frozen teacher's states of demonstration tokens."""


@torch.no_grad()
def update_average(average: dict[str, Tensor], student: dict[str, Tensor], rate: float) -> None:
    """average <- (1 - rate) * average + rate * student, matrix by matrix, in float32."""
    for name, tensor in average.items():
        tensor.lerp_(student[name], rate)


class Teacher:
    """Scores sequences with the recipe's teacher; rehearsal always with the parent, without demonstration.

    A frozen teacher's states of a demonstration's own tokens are computed once, and so are the key-value
    states of the demonstrations that many prompts begin with. Frozen sequences run one at a time, so that
    a score never depends on what else was in the batch or in the cache: a resumed run repeats it exactly.
    """

    def __init__(self, model: Model, recipe: Recipe) -> None:
        self._model = model
        self._frozen = recipe.teacher in ("parent", "base")
        weights: dict[str, Role | None] = {
            "ema": "ema",
            "live": "student",
            "parent": model.parent(),
            "base": None,
        }
        self.adapter = weights[recipe.teacher]
        self._own_states: dict[int, Tensor] = {}
        self._own_bytes = 0
        self._prefixes: dict[tuple[int, ...], DynamicCache] = {}

    @torch.no_grad()
    def states(self, sequences: Sequence[Training]) -> list[Tensor]:
        """Hidden states that predict each response token, [response, hidden] per sequence."""
        found: dict[int, Tensor] = {}
        # The same blocks on every process, whatever its share holds.
        for role in dict.fromkeys([self.adapter, self._model.parent()]):
            together: list[int] = []
            with self._model.using(role):
                for index, sequence in enumerate(sequences):
                    if role != (self._model.parent() if sequence.rehearsal else self.adapter):
                        continue
                    if self._frozen and not sequence.rehearsal:
                        found[index] = self._frozen_states(sequence)
                    else:
                        together.append(index)
                rows = [(sequences[i].teacher_prompt, sequences[i].response) for i in together]
                found.update(zip(together, all_response_states(self._model, rows), strict=True))
        return [found[index] for index in range(len(sequences))]

    def _frozen_states(self, sequence: Training) -> Tensor:
        if sequence.lesson is not None and sequence.lesson in self._own_states:
            return self._own_states[sequence.lesson]
        prompt, shared = sequence.teacher_prompt, sequence.shared_tokens
        cache = copy.deepcopy(self._prefix(tuple(prompt[:shared])))
        ids = torch.tensor([[*prompt[shared:], *sequence.response[:-1]]], device=self._model.device)
        states = self._model.hidden(ids, cache=cache)[0, -len(sequence.response) :].clone()
        # Full means full: epochs visit lessons in a cycle, where evicting the oldest would always evict the
        # one that comes next.
        if sequence.lesson is not None and self._own_bytes + states.nbytes <= OWN_STATES_BYTES:
            self._own_states[sequence.lesson] = states
            self._own_bytes += states.nbytes
        return states

    def _prefix(self, tokens: tuple[int, ...]) -> DynamicCache:
        if tokens not in self._prefixes:
            cache = DynamicCache()
            if tokens:
                self._model.hidden(torch.tensor([tokens], device=self._model.device), cache=cache)
            self._prefixes[tokens] = cache
        return self._prefixes[tokens]
