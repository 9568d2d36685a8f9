"""The divergences against hand-worked numbers and against a naive float64 autograd."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from domain.recipe import Recipe
from trainer import loss
from trainer.divergence import Compare, bucketed, divergence_of, forward_kl, jsd, reverse_kl
from trainer.loss import Drawn, cross_entropy_loss, divergence_loss


def plain(log_s: Tensor, log_t: Tensor, divergence: str) -> Tensor:
    """The definition, row by row."""
    if divergence == "forward":
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if divergence == "reverse":
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    mixture = (0.5 * log_t.exp() + 0.5 * log_s.exp()).log()
    return 0.5 * plain(mixture, log_t, "forward") + 0.5 * plain(mixture, log_s, "forward")


def naive(
    student: Tensor, teacher: Tensor, head: Tensor, weights: Tensor, temperature: float, divergence: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, per-token divergence and gradient in the hidden states, by autograd in float64."""
    hidden = student.double().requires_grad_()
    log_s = functional.log_softmax(hidden @ head.double().T / temperature, -1)
    log_t = functional.log_softmax(teacher.double() @ head.double().T / temperature, -1)
    kl = plain(log_s, log_t, divergence)
    total = (kl * weights.double()).sum()
    total.backward()
    assert hidden.grad is not None
    return total.detach(), kl.detach(), hidden.grad


def named(divergence: str) -> Compare:
    return divergence_of(Recipe.model_validate({"divergence": divergence}))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
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
    result = divergence_loss(hidden, teacher, head, weights, temperature, named(divergence))
    (3.0 * result.total).backward()
    assert result.total.item() == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(result.per_token.double(), kl, rtol=1e-4, atol=1e-5)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), 3.0 * grad, rtol=1e-4, atol=5e-5)
    assert hidden.grad[3].abs().max() == 0


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_zero_loss_and_gradient_where_student_equals_teacher(divergence: str) -> None:
    torch.manual_seed(1)
    same, head = torch.randn(5, 8), torch.randn(11, 8)
    hidden = same.clone().requires_grad_()
    result = divergence_loss(hidden, same, head, torch.full((5,), 0.2), 1.0, named(divergence))
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
    result = divergence_loss(student, teacher, torch.eye(2), torch.ones(1), 2.0, reverse_kl)
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


def test_jsd_by_hand() -> None:
    """p_S = (1/2, 1/2), p_T = (3/4, 1/4), beta 1/4: m = (9/16, 7/16).

    KL(T||m) = 3/4 ln(4/3) + 1/4 ln(4/7) = 0.075858; KL(S||m) = 1/2 ln(8/9) + 1/2 ln(8/7) = 0.007874;
    1/4 of the first and 3/4 of the second are 0.024870.
    Gradient 3/4 * 1/2 * (ln(8/9) - 0.007874) = -0.047121 on the first logit.
    """
    log_s, log_t = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    value, grad = jsd(log_s, log_t, 0.25)
    assert value.item() == pytest.approx(0.024870, abs=1e-6)
    assert grad.tolist()[0] == pytest.approx([-0.047121, 0.047121], abs=1e-6)


def test_top_k_with_a_tail_by_hand() -> None:
    """p_T = (.6, .3, .1), p_S = (.2, .3, .5), teacher's top one: buckets (.6, .4) and (.2, .8).

    KL(T||S) = .6 ln 3 + .4 ln(1/2) = 0.381909. Gradient in the buckets p_S - p_T = (-.4, .4), the tail's
    spread by the student's own .3 : .5, so (-.4, .15, .25).
    """
    log_s, log_t = torch.tensor([[0.2, 0.3, 0.5]]).log(), torch.tensor([[0.6, 0.3, 0.1]]).log()
    value, grad = bucketed(forward_kl, 1, "teacher")(log_s, log_t)
    assert value.item() == pytest.approx(0.381909, abs=1e-6)
    assert grad.tolist()[0] == pytest.approx([-0.4, 0.15, 0.25], abs=1e-6)
    # The student's top one is the third: buckets (.1, .9) and (.5, .5).
    value, _ = bucketed(forward_kl, 1, "student")(log_s, log_t)
    assert value.item() == pytest.approx(0.1 * math.log(0.2) + 0.9 * math.log(1.8), abs=1e-6)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("support", ["teacher", "student"])
def test_top_k_gradient_equals_autograd(divergence: str, support: Literal["teacher", "student"]) -> None:
    torch.manual_seed(4)
    logits = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    log_t = torch.log_softmax(torch.randn(6, 20, dtype=torch.float64), -1)
    log_s = torch.log_softmax(logits, -1)
    places = (log_t if support == "teacher" else log_s).topk(5, -1).indices
    rest = torch.ones(6, 20, dtype=torch.bool).scatter(1, places, False)

    def buckets(logp: Tensor) -> Tensor:
        p = torch.cat([logp.exp().gather(1, places), (logp.exp() * rest).sum(-1, keepdim=True)], -1)
        return p.log()

    expected = plain(buckets(log_s), buckets(log_t), divergence)
    (grad,) = torch.autograd.grad(expected.sum(), logits)
    value, found = bucketed(named(divergence), 5, support)(log_s.detach(), log_t)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(found, grad)


def test_a_tail_of_nothing_stays_finite() -> None:
    certain = torch.log_softmax(torch.tensor([[200.0, 0.0, 0.0, -200.0]]), -1)
    for compare in (forward_kl, reverse_kl, lambda s, t: jsd(s, t, 0.5)):
        value, grad = bucketed(compare, 1, "teacher")(certain, certain)
        assert value.item() == pytest.approx(0.0, abs=1e-6)
        assert grad.isfinite().all()


def test_dynamic_weight_by_hand() -> None:
    """p = (1/4, 3/4), target the first: loss -1/4 ln 1/4, gradient 1/4 (p - onehot) = (-3/16, 3/16)."""
    hidden = torch.tensor([[0.25, 0.75]]).log().requires_grad_()
    result = cross_entropy_loss(hidden, torch.tensor([0]), torch.eye(2), torch.ones(1), dynamic=True)
    result.total.backward()
    assert result.total.item() == pytest.approx(-0.25 * math.log(0.25))
    assert hidden.grad is not None
    assert hidden.grad.tolist()[0] == pytest.approx([-3 / 16, 3 / 16])


def test_importance_weights_by_hand() -> None:
    """p_S of the drawn token is 1/2. Drawn at 1/3: ratio 3/2; at 1/10: 5, clipped to 2; not drawn: 1."""
    hidden = torch.zeros(3, 2, requires_grad=True)
    teacher = torch.tensor([[0.75, 0.25]]).log().repeat(3, 1)
    drawn = Drawn(torch.zeros(3, dtype=torch.long), torch.tensor([1 / 3, 0.1, math.nan]).log(), clip=2.0)
    result = divergence_loss(hidden, teacher, torch.eye(2), torch.ones(3), 1.0, forward_kl, drawn=drawn)
    result.total.backward()
    kl = 0.130812
    assert result.per_token.tolist() == pytest.approx([kl] * 3, abs=1e-6)
    assert result.total.item() == pytest.approx((1.5 + 2 + 1) * kl, abs=1e-5)
    assert result.ratio.tolist() == pytest.approx([1.5, 5, math.nan], nan_ok=True)
    assert hidden.grad is not None
    assert hidden.grad[:, 0].tolist() == pytest.approx([-0.375, -0.5, -0.25], abs=1e-6)


def test_the_output_layer_trains_where_it_requires_a_gradient() -> None:
    torch.manual_seed(5)
    rows = loss.CHUNK_ROWS + 5
    student, teacher = torch.randn(rows, 6), torch.randn(rows, 6)
    head, teacher_head, weights = torch.randn(13, 6), torch.randn(13, 6), torch.rand(rows)
    reference = head.double().requires_grad_()
    log_s = functional.log_softmax(student.double() @ reference.T, -1)
    log_t = functional.log_softmax(teacher.double() @ teacher_head.double().T, -1)
    kl = functional.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
    (kl * weights).sum().backward()
    own = head.clone().requires_grad_()
    result = divergence_loss(
        student.requires_grad_(), teacher, own, weights, 1.0, forward_kl, teacher_head=teacher_head
    )
    result.total.backward()
    assert own.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(own.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)
