"""Response tokens with the prompts that student and teacher read before them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.model import Model

BATCH_TOKENS = 2048
"""Padded tokens in one forward pass with gradients: bounds activation memory."""


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


def loss_mask(response: Sequence[int], *, skip_first: int, truncated: bool) -> list[bool]:
    """All but the first `skip_first` tokens; none of a truncated response."""
    return [not truncated and place >= skip_first for place in range(len(response))]


def token_weights(masks: Sequence[list[bool]]) -> list[list[float]]:
    """Weights that make a weighted sum the mean over each sequence's tokens, then over sequences.

    Sequences without a single unmasked token don't count in the second mean.
    """
    counted = sum(any(mask) for mask in masks)
    return [[float(kept) / (sum(mask) * counted) if kept else 0.0 for kept in mask] for mask in masks]


def micro_batches(lengths: Sequence[int], limit: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices grouped by similar length, at most `limit` padded tokens a group (or one sequence)."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # Sorted upwards, so this sequence is the longest of its group and every row is padded to it.
        group = groups[-1] if groups else None
        short = group is not None and lengths[group[0]] * 1.5 < lengths[index] and len(group) >= 4
        if group is None or short or (len(group) + 1) * lengths[index] > limit:
            groups.append([index])
        else:
            group.append(index)
    return groups


def response_states(model: Model, rows: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
    """Hidden states that predict each response token, [response, hidden] for each (prompt, response).

    Rows are padded on the right: under causal attention no real token sees the padding, so no mask is
    needed and the fast attention path applies.
    """
    length = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    for row, (prompt, response) in enumerate(rows):
        ids[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
    hidden = model.hidden(ids.to(model.device))
    return [
        hidden[row, len(prompt) - 1 : len(prompt) + len(response) - 1]
        for row, (prompt, response) in enumerate(rows)
    ]
