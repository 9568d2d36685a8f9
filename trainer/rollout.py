"""Sampling answers: many prompts at once, prompt KV cache reused, finished rows dropped."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from trainer.model import Model

MAX_ROWS = 96
"""Prompts decoded together: the decode step is bound by reading weights, so more rows are nearly free."""


@dataclass(frozen=True)
class Sample:
    tokens: list[int]
    """Ends with the stop token unless truncated."""
    truncated: bool


@torch.no_grad()
def sample(
    model: Model,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    temperature: float,
    generator: torch.Generator | None,
) -> list[Sample]:
    """One answer for each prompt, of at most its limit of tokens, by the adapter in use.

    Temperature 0 is greedy and takes no generator.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Sample] = {}
    for start in range(0, len(by_length), MAX_ROWS):
        chosen = by_length[start : start + MAX_ROWS]
        group = _sample_group(
            model, [prompts[i] for i in chosen], [limits[i] for i in chosen], temperature, generator
        )
        answers.update(zip(chosen, group, strict=True))
    return [answers[i] for i in range(len(prompts))]


def _sample_group(
    model: Model,
    prompts: list[list[int]],
    limits: list[int],
    temperature: float,
    generator: torch.Generator | None,
) -> list[Sample]:
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    tokens: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    stop = model.stop_ids
    cache = DynamicCache()
    while True:
        hidden = model.hidden(ids, cache=cache, attention_mask=mask, position_ids=positions)[:, -1]
        drawn = _draw(functional.linear(hidden, model.head).float(), temperature, generator).tolist()
        for row, token in zip(active, drawn, strict=True):
            tokens[row].append(token)
        kept = [
            place
            for place, (row, token) in enumerate(zip(active, drawn, strict=True))
            if token not in stop and len(tokens[row]) < limits[row]
        ]
        if not kept:
            return [Sample(answer, answer[-1] not in stop) for answer in tokens]
        ids = torch.tensor(drawn, device=model.device)[:, None]
        positions = positions[:, -1:] + 1
        if len(kept) < len(active):
            active = [active[place] for place in kept]
            keep = torch.tensor(kept, device=model.device)
            cache.batch_select_indices(keep)
            ids, positions, mask = ids[keep], positions[keep], mask[keep]
        mask = functional.pad(mask, (0, 1), value=1)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    # Inverse of the cumulative distribution, one uniform number a row: torch.multinomial draws one for
    # every entry of the vocabulary, which takes longer than the rest of the head.
    total = torch.softmax(logits / temperature, -1).cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=generator, device=logits.device) * total[:, -1:]
    return torch.searchsorted(total, drawn, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
