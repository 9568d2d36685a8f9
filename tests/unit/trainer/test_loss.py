"""The divergences against hand-worked numbers and against a naive float64 autograd."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainer import loss
from trainer.loss import cross_entropy_loss, divergence_loss, forward_kl, reverse_kl


def naive(
    student: Tensor, teacher: Tensor, head: Tensor, weights: Tensor, temperature: float, divergence: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, per-token divergence and gradient in the hidden states, by autograd in float64."""
    hidden = student.double().requires_grad_()
    log_s = functional.log_softmax(hidden @ head.double().T / temperature, -1)
    log_t = functional.log_softmax(teacher.double() @ head.double().T / temperature, -1)
    if divergence == "forward":
        kl = functional.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
    else:
        kl = functional.kl_div(log_t, log_s, log_target=True, reduction="none").sum(-1)
    total = (kl * weights.double()).sum()
    total.backward()
    assert hidden.grad is not None
    return total.detach(), kl.detach(), hidden.grad


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_loss_and_gradient_equal_float64_autograd(divergence: str, temperature: float) -> None:
    torch.manual_seed(0)
    # More rows than one chunk, and a masked (weight zero) row among them.
    rows = loss.CHUNK_ROWS + 9
    student, teacher, head = torch.randn(rows, 8), torch.randn(rows, 8), torch.randn(31, 8)
    weights = torch.rand(rows)
    weights[3] = 0.0
    total, kl, grad = naive(student, teacher, head, weights, temperature, divergence)
    hidden = student.clone().requires_grad_()
    result = divergence_loss(hidden, teacher, head, weights, temperature, divergence)
    (3.0 * result.total).backward()
    assert result.total.item() == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(result.per_token.double(), kl, rtol=1e-4, atol=1e-5)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), 3.0 * grad, rtol=1e-4, atol=5e-5)
    assert hidden.grad[3].abs().max() == 0


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_zero_loss_and_gradient_where_student_equals_teacher(divergence: str) -> None:
    torch.manual_seed(1)
    same, head = torch.randn(5, 8), torch.randn(11, 8)
    hidden = same.clone().requires_grad_()
    result = divergence_loss(hidden, same, head, torch.full((5,), 0.2), 1.0, divergence)  # type: ignore[arg-type]
    result.total.backward()
    assert result.total.item() == pytest.approx(0.0, abs=1e-7)
    assert hidden.grad is not None
    assert hidden.grad.abs().max().item() == pytest.approx(0.0, abs=1e-7)


def test_one_token_by_hand() -> None:
    """p_S = (1/2, 1/2), p_T = (3/4, 1/4).

    forward: 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812; gradient p_S - p_T = (-1/4, 1/4).
    reverse: 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3) = 0.143841;
    gradient 1/2 (ln(2/3) - 0.143841) = -0.274653 and 1/2 (ln 2 - 0.143841) = 0.274653.
    """
    log_s = torch.tensor([[0.5, 0.5]]).log()
    log_t = torch.tensor([[0.75, 0.25]]).log()
    kl, grad = forward_kl(log_s, log_t)
    assert kl.item() == pytest.approx(0.130812, abs=1e-6)
    assert grad.tolist()[0] == pytest.approx([-0.25, 0.25], abs=1e-6)
    kl, grad = reverse_kl(log_s, log_t)
    assert kl.item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    assert grad.tolist()[0] == pytest.approx([-0.274653, 0.274653], abs=1e-6)


def test_temperature_divides_both_logits() -> None:
    """With an identity head, logits (0, 2 ln 3) at temperature 2 are (0, ln 3): p = (1/4, 3/4)."""
    student = torch.tensor([[0.0, 2 * math.log(3)]])
    teacher = torch.zeros(1, 2)
    result = divergence_loss(student, teacher, torch.eye(2), torch.ones(1), 2.0, "reverse")
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert result.per_token.item() == pytest.approx(expected, abs=1e-6)
    assert result.entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75), abs=1e-6)


def test_cross_entropy_equals_torch() -> None:
    torch.manual_seed(2)
    rows = loss.CHUNK_ROWS + 3
    student, head = torch.randn(rows, 6), torch.randn(17, 6)
    targets, weights = torch.randint(0, 17, (rows,)), torch.rand(rows)
    reference = student.double().requires_grad_()
    per_token = functional.cross_entropy(reference @ head.double().T, targets, reduction="none")
    (per_token * weights).sum().backward()
    hidden = student.clone().requires_grad_()
    result = cross_entropy_loss(hidden, targets, head, weights)
    result.total.backward()
    torch.testing.assert_close(result.per_token.double(), per_token.detach(), rtol=1e-5, atol=1e-5)
    assert hidden.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(hidden.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)
