"""Per-token divergences over the whole vocabulary, without ever holding [tokens, vocabulary].

The student's and teacher's hidden states at response positions are projected through the output layer a
few rows at a time; the gradient in the student's logits is formed there by its closed form and carried
back to the hidden states at once, so that a chunk's logits can be forgotten.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from domain.recipe import Divergence

CHUNK_ROWS = 64
"""Rows of logits held at once: 64 x 49152 float32 are 12.6 MB."""


class TokenLoss(NamedTuple):
    """`total` is sum(weight * loss per token) and carries the gradient; the others are per token, in nats."""

    total: Tensor
    per_token: Tensor
    entropy: Tensor


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) per row and its gradient in the student's logits, p_S - p_T."""
    teacher_p = teacher_logp.exp()
    kl = (teacher_p * (teacher_logp - student_logp)).sum(-1)
    return kl, student_logp.exp().sub_(teacher_p)


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) per row and its gradient, p_S * (log p_S - log p_T - KL)."""
    student_p = student_logp.exp()
    ratio = student_logp - teacher_logp
    kl = (student_p * ratio).sum(-1)
    return kl, student_p.mul_(ratio.sub_(kl[:, None]))


DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
}


def _log_probabilities(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    logits = functional.linear(hidden, head).float()
    return torch.log_softmax(logits.div_(temperature), dim=-1)


class _ChunkedLoss(torch.autograd.Function):
    """`rows(start, end, student_logp)` gives a chunk's per-token loss and gradient in its logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        weights: Tensor,
        temperature: float,
        rows: Callable[[int, int, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses, entropies, grad_hidden = [], [], torch.empty_like(hidden)
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            end = min(start + CHUNK_ROWS, hidden.shape[0])
            logp = _log_probabilities(hidden[start:end], head, temperature)
            entropies.append(-(logp.exp() * logp).sum(-1))
            loss, grad_logits = rows(start, end, logp)
            losses.append(loss)
            grad_logits.mul_(weights[start:end, None] / temperature)
            grad_hidden[start:end] = grad_logits.to(head.dtype) @ head
        per_token = torch.cat(losses)
        ctx.save_for_backward(grad_hidden)
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(per_token, entropy)
        return (per_token * weights).sum(), per_token, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), None, None, None, None


def divergence_loss(
    student: Tensor,
    teacher: Tensor,
    head: Tensor,
    weights: Tensor,
    temperature: float,
    divergence: Divergence,
) -> TokenLoss:
    """Weighted sum of the divergence over N tokens; both logits are divided by `temperature`.

    student, teacher: [N, hidden]; head: [vocabulary, hidden], frozen; weights: [N] float32. Gradient
    reaches `student` only.
    """
    formula = DIVERGENCES[divergence]

    def rows(start: int, end: int, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        return formula(student_logp, _log_probabilities(teacher[start:end], head, temperature))

    return TokenLoss(*_ChunkedLoss.apply(student, head, weights, temperature, rows))


def cross_entropy_loss(student: Tensor, targets: Tensor, head: Tensor, weights: Tensor) -> TokenLoss:
    """Weighted sum of -log p_S(target): the supervised control, on the same path and at temperature 1.

    student: [N, hidden]; targets: [N] token ids; head: [vocabulary, hidden]; weights: [N] float32.
    """

    def rows(start: int, end: int, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        chosen = targets[start:end, None]
        grad = student_logp.exp().scatter_add_(
            1, chosen, torch.full(chosen.shape, -1.0, device=chosen.device)
        )
        return -student_logp.gather(1, chosen)[:, 0], grad

    return TokenLoss(*_ChunkedLoss.apply(student, head, weights, 1.0, rows))
