"""Choosing the next token, and log-probabilities of tokens. Log-probabilities are those of the
model's own distribution, before temperature and truncation, in nats."""

from dataclasses import dataclass, field

import torch

_ROWS_AT_ONCE = 128
"""Rows of [rows, vocabulary] that are held in float32 at a time."""


@dataclass(frozen=True)
class SamplingParams:
    """What one sequence asks for."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is the whole vocabulary."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    ignore_eos: bool = False
    logprobs: int | None = None
    """Most likely tokens reported beside the chosen one; None reports nothing."""
    score_prompt: bool = False
    """Also report the log-probabilities of the prompt's tokens."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely tokens, best first."""


def generator(seed: int | None, device: torch.device) -> torch.Generator:
    """A sequence's own stream of randomness: what else runs does not touch it."""
    made = torch.Generator(device=device)
    if seed is None:
        made.seed()
    else:
        made.manual_seed(seed)
    return made


def choose(
    logits: torch.Tensor, params: list[SamplingParams], generators: list[torch.Generator | None]
) -> list[int | None]:
    """Next tokens for logits [rows, vocabulary], None for a row that is not finite.

    `generators` has None for greedy rows.
    """
    best = logits.max(dim=-1)
    chosen: list[int | None] = best.indices.tolist()
    # A NaN anywhere in a row is its maximum.
    finite: list[bool] = best.values.isfinite().tolist()
    for row, (wanted, random) in enumerate(zip(params, generators, strict=True)):
        if not finite[row]:
            chosen[row] = None
        elif random is not None:
            chosen[row] = _sample(logits[row].float(), wanted, random)
    return chosen


def _sample(logits: torch.Tensor, params: SamplingParams, random: torch.Generator) -> int:
    scaled = logits / params.temperature
    if params.top_k:
        least = scaled.topk(min(params.top_k, scaled.numel())).values[-1]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    if params.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        # Kept: the smallest set that reaches top_p, so a token goes when those before it already do.
        beyond = ordered.cumsum(dim=-1) - ordered >= params.top_p
        probabilities[order[beyond]] = 0.0
    # argmax(p / e), e exponential, is a draw from p; zeros are never drawn.
    noise = torch.empty_like(probabilities).exponential_(generator=random)
    return int((probabilities / noise).argmax())


def logprobs(logits: torch.Tensor, tokens: list[int], top: list[int]) -> list[TokenLogprob]:
    """Log-probability of `tokens[i]` under `logits[i]` with its `top[i]` most likely alternatives."""
    scored = []
    for start in range(0, len(tokens), _ROWS_AT_ONCE):
        rows = logits[start : start + _ROWS_AT_ONCE].float()
        targets = tokens[start : start + _ROWS_AT_ONCE]
        wanted = top[start : start + _ROWS_AT_ONCE]
        normaliser = rows.logsumexp(dim=-1)
        index = torch.tensor(targets, device=rows.device)
        chosen = (rows.gather(1, index[:, None])[:, 0] - normaliser).tolist()
        widest = max(wanted)
        if widest == 1:
            best = rows.max(dim=-1)
            values, indices = best.values[:, None], best.indices[:, None]
        else:
            values, indices = rows.topk(widest, dim=-1)
        best_values: list[list[float]] = (values - normaliser[:, None]).tolist()
        best_indices: list[list[int]] = indices.tolist()
        for row, token in enumerate(targets):
            most = zip(best_indices[row][: wanted[row]], best_values[row][: wanted[row]], strict=True)
            scored.append(TokenLogprob(token=token, logprob=chosen[row], top=list(most)))
    return scored
