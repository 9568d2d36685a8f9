"""Per-token losses over the whole vocabulary, without ever holding [tokens, vocabulary].

The student's and teacher's hidden states at response positions are projected through the output layer a
few rows at a time; the gradient in the student's logits is formed there by its closed form and carried
back to the hidden states (and to the output layer where it trains) at once, so that a chunk's logits can
be forgotten.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from trainer.divergence import Compare

CHUNK_ROWS = 64
"""Rows of logits held at once: 64 x 49152 float32 are 12.6 MB."""


MAX_LOG_RATIO = 80.0
"""Keeps the ratio of probabilities finite in float32."""


class TokenLoss(NamedTuple):
    """`total` is sum(weight * loss per token) and carries the gradient; the others are per token, in nats."""

    total: Tensor
    per_token: Tensor
    entropy: Tensor
    ratio: Tensor
    """p now / p when drawn, before clipping; NaN where no importance weight was asked for."""


class Drawn(NamedTuple):
    """Tokens that another policy drew (a stale student, another engine), for importance weights."""

    tokens: Tensor
    """[N] token ids."""
    logprobs: Tensor
    """[N] log-probabilities when drawn, at the loss's temperature; NaN where a token was not drawn."""
    clip: float

    def ratios(self, start: int, end: int, student_logp: Tensor) -> Tensor:
        """exp(log p now - log p when drawn) for each of the chunk's tokens; NaN where not drawn."""
        now = student_logp.gather(1, self.tokens[start:end, None])[:, 0]
        return (now - self.logprobs[start:end]).clamp(max=MAX_LOG_RATIO).exp()

    def weights(self, ratios: Tensor) -> Tensor:
        """min(ratio, clip); 1 where not drawn."""
        return ratios.clamp(max=self.clip).nan_to_num(nan=1.0)


RowLoss = Callable[[int, int, Tensor], tuple[Tensor, Tensor]]
"""(start, end, student log-probabilities of those rows) -> loss per row, gradient in their logits."""


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        weights: Tensor,
        temperature: float,
        rows: RowLoss,
        drawn: Drawn | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        losses, entropies, totals = [], [], []
        ratio = torch.full_like(weights, torch.nan)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            end = min(start + CHUNK_ROWS, hidden.shape[0])
            logp = _log_probabilities(hidden[start:end], head, temperature)
            entropies.append(-(logp.exp() * logp).sum(-1))
            weight = weights[start:end]
            if drawn is not None:
                ratio[start:end] = drawn.ratios(start, end, logp)
                weight = weight * drawn.weights(ratio[start:end])
            loss, grad_logits = rows(start, end, logp)
            losses.append(loss)
            totals.append((loss * weight).sum())
            grad = grad_logits.mul_(weight[:, None] / temperature).to(head.dtype)
            grad_hidden[start:end] = grad @ head
            if grad_head is not None:
                grad_head += grad.T @ hidden[start:end]
        per_token, entropy = torch.cat(losses), torch.cat(entropies)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(per_token, entropy, ratio)
        return torch.stack(totals).sum(), per_token, entropy, ratio

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scaled = grad_hidden * grads[0].to(grad_hidden.dtype)
        return scaled, None if grad_head is None else grad_head * grads[0], None, None, None, None


def _log_probabilities(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    logits = functional.linear(hidden, head).float()
    return torch.log_softmax(logits.div_(temperature), dim=-1)


def divergence_loss(
    student: Tensor,
    teacher: Tensor,
    head: Tensor,
    weights: Tensor,
    temperature: float,
    compare: Compare,
    *,
    teacher_head: Tensor | None = None,
    drawn: Drawn | None = None,
) -> TokenLoss:
    """Weighted sum of the divergence over N tokens; both logits are divided by `temperature`.

    student, teacher: [N, hidden]; head: [vocabulary, hidden], the teacher's too unless `teacher_head` is
    given; weights: [N] float32. Gradient reaches `student`, and `head` where it requires one.
    """
    its_head = (head if teacher_head is None else teacher_head).detach()

    def rows(start: int, end: int, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        return compare(student_logp, _log_probabilities(teacher[start:end], its_head, temperature))

    return TokenLoss(*_ChunkedLoss.apply(student, head, weights, temperature, rows, drawn))


def cross_entropy_loss(
    student: Tensor, targets: Tensor, head: Tensor, weights: Tensor, *, dynamic: bool = False
) -> TokenLoss:
    """Weighted sum of -log p_S(target) at temperature 1, on the same path as the divergence.

    `dynamic` weighs each token by its own probability, without gradient (DFT, arXiv 2508.05629), in
    `total` alone; `per_token` stays the cross-entropy. student: [N, hidden]; targets: [N] token ids; head:
    [vocabulary, hidden]; weights: [N] float32.
    """

    def rows(start: int, end: int, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        chosen = targets[start:end, None]
        logp = student_logp.gather(1, chosen)
        grad = student_logp.exp().scatter_add_(1, chosen, -torch.ones_like(logp))
        if not dynamic:
            return -logp[:, 0], grad
        own = logp.exp()
        return (-own * logp)[:, 0], grad.mul_(own)

    return TokenLoss(*_ChunkedLoss.apply(student, head, weights, 1.0, rows, None))
