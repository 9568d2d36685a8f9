"""Sampling answers: many prompts at once, their common beginning read once, finished rows dropped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from trainer import distributed
from trainer.kv_cache import growing_cache
from trainer.model import Model, Role
from trainer.packing import common_beginning

MAX_ROWS = 96
"""Prompts decoded together: the decode step is bound by reading weights, so more rows are nearly free."""


@dataclass(frozen=True)
class Sample:
    tokens: list[int]
    """Ends with the stop token unless truncated."""
    truncated: bool
    logprobs: list[float]
    """Log-probability of each token under the tempered distribution, before `top_p`; empty when greedy."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Temperature 0 is greedy."""

    temperature: float
    top_p: float = 1.0
    seed: int = 0
    """A row's draws depend on the seed, its place among the prompts and nothing else: neither on the
    grouping nor on the other rows."""


GREEDY = Sampling(temperature=0.0)


class Rollouts(Protocol):
    """Where answers come from: this process's own model, or an inference server that has its weights."""

    @property
    def gap(self) -> float | None:
        """Mean |log p when drawn - the model's own log p| of a token of the last round, nats; None where the
        model drew."""

    def draw(
        self, role: Role | None, prompts: Sequence[list[int]], limits: Sequence[int], sampling: Sampling
    ) -> list[Sample]:
        """One answer of `role` to each prompt, of at most its limit of tokens."""


class OwnRollouts:
    """The model samples itself."""

    gap: float | None = None

    def __init__(self, model: Model) -> None:
        self._model = model

    def draw(
        self, role: Role | None, prompts: Sequence[list[int]], limits: Sequence[int], sampling: Sampling
    ) -> list[Sample]:
        with self._model.using(role):
            return sample(self._model, prompts, limits, sampling)


@torch.no_grad()
def sample(
    model: Model, prompts: Sequence[list[int]], limits: Sequence[int], sampling: Sampling
) -> list[Sample]:
    """One answer for each prompt, of at most its limit of tokens, by the role in use.

    Processes that train together draw a share each and return all answers.
    """
    if not prompts:
        return []
    generator = torch.Generator().manual_seed(sampling.seed)
    uniforms = torch.rand(len(prompts), max(limits), generator=generator)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    mine = distributed.share(by_length)
    drawn: list[Sample] = []
    for start in range(0, len(mine), MAX_ROWS):
        chosen = mine[start : start + MAX_ROWS]
        drawn += _sample_group(
            model,
            [prompts[i] for i in chosen],
            [limits[i] for i in chosen],
            sampling,
            uniforms[chosen].to(model.device),
        )
    model.catch_up()
    answers = dict(zip(by_length, distributed.collect(drawn), strict=True))
    return [answers[i] for i in range(len(prompts))]


def _sample_group(
    model: Model,
    prompts: list[list[int]],
    limits: list[int],
    sampling: Sampling,
    uniforms: Tensor,
) -> list[Sample]:
    cache = growing_cache()
    # Something must be left to read in every row: its last state draws the first token.
    shared = min(common_beginning(min(prompts), max(prompts)), min(map(len, prompts)) - 1)
    if shared and len(prompts) > 1:
        model.hidden(torch.tensor([prompts[0][:shared]], device=model.device), cache=cache)
        cache.batch_repeat_interleave(len(prompts))
    else:
        shared = 0
    ids, mask = _left_padded([prompt[shared:] for prompt in prompts])
    positions = (shared + mask.cumsum(-1) - 1).clamp(min=0).to(model.device)
    mask = functional.pad(mask, (shared, 0), value=1).to(model.device)
    ids = ids.to(model.device)
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    stop = model.stop_ids
    while True:
        hidden = model.hidden(ids, cache=cache, attention_mask=mask, position_ids=positions)[:, -1]
        logits = functional.linear(hidden, model.head).float()
        places = torch.tensor([len(tokens[row]) for row in active], device=model.device)
        drawn_ids, drawn_logp = _draw(logits, sampling, uniforms[active, places])
        drawn = drawn_ids.tolist()
        for row, token in zip(active, drawn, strict=True):
            tokens[row].append(token)
        if drawn_logp is not None:
            for row, value in zip(active, drawn_logp.tolist(), strict=True):
                logprobs[row].append(value)
        kept = [
            place
            for place, (row, token) in enumerate(zip(active, drawn, strict=True))
            if token not in stop and len(tokens[row]) < limits[row]
        ]
        if not kept:
            return [
                Sample(answer, answer[-1] not in stop, values)
                for answer, values in zip(tokens, logprobs, strict=True)
            ]
        ids = drawn_ids[:, None]
        positions = positions[:, -1:] + 1
        if len(kept) < len(active):
            active = [active[place] for place in kept]
            keep = torch.tensor(kept, device=model.device)
            cache.batch_select_indices(keep)
            ids, positions, mask = ids[keep], positions[keep], mask[keep]
        mask = functional.pad(mask, (0, 1), value=1)


def _left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, both [rows, longest]."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    return ids, mask


def _draw(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> tuple[Tensor, Tensor | None]:
    """A token for each row and, unless greedy, its log-probability; uniforms: [rows], in [0, 1).

    Inverse of the cumulative distribution, one uniform number a row: torch.multinomial draws one for every
    entry of the vocabulary, which takes longer than the rest of the head.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1), None
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p == 1:
        places = _invert(probabilities.cumsum(-1), uniforms)
        return places[:, 0], _chosen(probabilities, places)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    total = ordered.cumsum(-1)
    # The smallest set whose mass reaches top_p: a token stays when the mass before it is less.
    nucleus = ordered.masked_fill_(total - ordered >= sampling.top_p, 0).cumsum(-1)
    places = order.gather(1, _invert(nucleus, uniforms))
    return places[:, 0], _chosen(probabilities, places)


def _invert(total: Tensor, uniforms: Tensor) -> Tensor:
    """First place whose cumulative mass exceeds the uniform share of the last one, [rows, 1]."""
    drawn = uniforms[:, None] * total[:, -1:]
    return torch.searchsorted(total, drawn, right=True).clamp(max=total.shape[1] - 1)


def _chosen(probabilities: Tensor, places: Tensor) -> Tensor:
    return probabilities.gather(1, places)[:, 0].clamp(min=torch.finfo(torch.float32).tiny).log()
