"""Divergences between two distributions over the vocabulary, row by row, with their gradients.

Every function takes log-probabilities, student's and teacher's, [rows, vocabulary] in float32, and gives
the divergence, [rows] in nats, and its gradient in the student's logits, [rows, vocabulary].
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from domain.recipe import Recipe

Compare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student); gradient p_S - p_T."""
    teacher_p = teacher_logp.exp()
    kl = (teacher_p * (teacher_logp - student_logp)).sum(-1)
    return kl, student_logp.exp().sub_(teacher_p)


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher); gradient p_S (log p_S - log p_T - KL)."""
    return _against(student_logp, teacher_logp)


def jsd(student_logp: Tensor, teacher_logp: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta p_T + (1 - beta) p_S, as GKD has it
    (arXiv 2306.13649); gradient (1 - beta) p_S (log p_S - log m - KL(student || m))."""
    mixture = torch.logaddexp(teacher_logp + math.log(beta), student_logp + math.log1p(-beta))
    student_part, grad = _against(student_logp, mixture)
    teacher_part = (teacher_logp.exp() * (teacher_logp - mixture)).sum(-1)
    return beta * teacher_part + (1 - beta) * student_part, grad.mul_(1 - beta)


def _against(student_logp: Tensor, other_logp: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || other) and its gradient in the student's logits with `other` held fixed."""
    student_p = student_logp.exp()
    ratio = student_logp - other_logp
    kl = (student_p * ratio).sum(-1)
    return kl, student_p.mul_(ratio.sub_(kl[:, None]))


def bucketed(compare: Compare, k: int, support: Literal["teacher", "student"]) -> Compare:
    """`compare` over `k` tokens and one bucket for all others.

    Without that bucket the loss could be lowered by moving mass out of sight (arXiv 2608.14728). The
    support is held fixed in the gradient: within the bucket the gradient is spread by the student's own
    probabilities, since d log p_tail / d z_v = p_v / p_tail - p_v.
    """

    def compared(student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
        if k >= student_logp.shape[-1]:
            return compare(student_logp, teacher_logp)
        shown = teacher_logp if support == "teacher" else student_logp
        places = shown.topk(k, dim=-1).indices
        ours, tail = _with_tail(student_logp, places)
        theirs, _ = _with_tail(teacher_logp, places)
        divergence, grad = compare(ours, theirs)
        spread = (student_logp - tail[:, None]).exp() * grad[:, -1:]
        return divergence, spread.scatter_(1, places, grad[:, :-1])

    return compared


def _with_tail(logp: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities at `places` and of all the rest together, [rows, k + 1]; and the latter alone."""
    rest = logp.scatter(1, places, -torch.inf)
    # A tail that underflows is the smallest number rather than nothing: its logarithm must be finite.
    tail = rest.logsumexp(-1).clamp(min=math.log(torch.finfo(torch.float32).tiny))
    return torch.cat([logp.gather(1, places), tail[:, None]], -1), tail


def divergence_of(recipe: Recipe) -> Compare:
    """The comparison that `divergence`, `jsd_beta` and `divergence_top_k` name."""
    chosen: dict[str, Compare] = {
        "forward": forward_kl,
        "reverse": reverse_kl,
        "jsd": partial(jsd, beta=recipe.jsd_beta),
    }
    compare = chosen[recipe.divergence]
    if recipe.divergence_top_k is None:
        return compare
    return bucketed(compare, recipe.divergence_top_k, recipe.top_k_support)
