"""Response tokens with the prompts that student and teacher read before them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.model import Model
from trainer.packing import pack


@dataclass(frozen=True)
class Training:
    """One sequence of a step."""

    prompt: list[int]
    teacher_prompt: list[int]
    shared_tokens: int
    """Tokens of `teacher_prompt` that other sequences' teacher prompts begin with too."""
    response: list[int]
    rehearsal: bool
    """True: the teacher is the parent and sees no demonstration."""
    lesson: int | None
    """Index of the lesson when the response is the demonstration's own, which never changes."""
    mask: list[bool]
    """Response tokens that count in the loss."""
    logprobs: list[float] | None = None
    """Of the response's tokens when the student drew them; None when it did not draw them."""
    share: float = 1.0
    """Of its prompt's weight in the loss: several samples on one prompt divide it."""


def loss_mask(response: Sequence[int], *, skip_first: int, truncated: bool) -> list[bool]:
    """All but the first `skip_first` tokens; none of a truncated response."""
    return [not truncated and place >= skip_first for place in range(len(response))]


def token_weights(sequences: Sequence[Training]) -> list[list[float]]:
    """Weights that make a weighted sum the mean over each sequence's tokens, then over sequences by `share`.

    Sequences without a single unmasked token don't count in the second mean.
    """
    counted = sum(one.share for one in sequences if any(one.mask))
    return [
        [one.share / (sum(one.mask) * counted) if kept else 0.0 for kept in one.mask] for one in sequences
    ]


class ResponseStates(NamedTuple):
    """What one forward pass gives."""

    members: list[int]
    """Indices of its sequences."""
    states: list[Tensor]
    """Hidden states that predict each response token, [response, hidden] for each member."""


def response_states(model: Model, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[ResponseStates]:
    """Run every (prompt, response) in as few forward passes as memory allows; each pass's graph may be
    freed before the next one begins."""
    # Nothing is predicted from the last token.
    batches = pack([[*prompt, *response[:-1]] for prompt, response in rows], share=model.shares_prefixes)
    for batch in batches:
        hidden = model.packed_states(batch)
        states = [
            hidden[row, torch.tensor(columns[len(rows[index][0]) - 1 :], device=model.device)]
            for index, (row, columns) in batch.places.items()
        ]
        yield ResponseStates(list(batch.places), states)


def all_response_states(model: Model, rows: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
    """The states of every (prompt, response) in order, for scoring."""
    found: dict[int, Tensor] = {}
    for members, states in response_states(model, rows):
        found.update(zip(members, states, strict=True))
    return [found[index] for index in range(len(rows))]
