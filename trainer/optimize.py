"""One optimizer step: teacher states, student states, the divergence, AdamW."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from domain.recipe import Recipe
from trainer import distributed
from trainer.divergence import divergence_of, reverse_kl
from trainer.loss import Drawn, TokenLoss, cross_entropy_loss, divergence_loss
from trainer.methods import plan_of
from trainer.model import Model
from trainer.sequences import Training, all_response_states, response_states, token_weights
from trainer.teacher import Teacher, update_average


@dataclass(frozen=True)
class StepFigures:
    """Means over unmasked response tokens, nats; None where the step has no such token."""

    loss: float
    teacher_kl: float | None
    """The recipe's divergence on lessons, or the cross-entropy of a supervised method."""
    rehearsal_kl: float | None
    base_kl: float | None
    """KL(student || base) on what the student drew itself, where this step measures it."""
    entropy: float | None
    importance: "Importance | None"
    """None where no token has an importance weight."""
    grad_norm: float
    teacher_tokens: int
    """Padded tokens that the frozen roles read; the base's too where it is measured."""
    student_tokens: int
    scored_tokens: int
    """Response tokens in the loss."""
    teacher_seconds: float
    student_seconds: float


@dataclass(frozen=True)
class Importance:
    """Drawn tokens' probability now over that when drawn, before clipping."""

    mean: float
    max: float
    clipped_share: float


class Optimizer:
    """AdamW over the student's float32 parameters, and the moving average where the recipe has one."""

    def __init__(self, model: Model, recipe: Recipe, teacher: Teacher, importance_clip: float | None) -> None:
        """`importance_clip`: most that a drawn token's importance weight may be; None: each weighs 1."""
        self._model = model
        self._recipe = recipe
        self._importance_clip = importance_clip
        self._plan = plan_of(recipe)
        self._compare = divergence_of(recipe)
        self._teacher = teacher
        self.parameters = model.parameters("student")
        self._adam = torch.optim.AdamW(
            list(self.parameters.values()), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )

    def step(
        self, sequences: Sequence[Training], learning_rate: float, *, measure_base: bool = False
    ) -> StepFigures:
        """One step of AdamW at `learning_rate` on `sequences`, of which each process works on a share."""
        started, read = time.monotonic(), self._model.tokens_read
        weights = token_weights(sequences)
        counted = [pair for pair in zip(sequences, weights, strict=True) if any(pair[0].mask)]
        mine = distributed.share(counted)
        scored = [s for s, _ in mine if s.rehearsal or self._plan.loss == "divergence"]
        states = dict(zip(map(id, scored), self._teacher.states(scored), strict=True))
        scored_at = time.monotonic()
        base = self._base_states([s for s, _ in mine]) if measure_base else {}
        teacher_tokens = self._model.tokens_read - read
        measured = self._backward(mine, states, base)
        student_tokens = self._model.tokens_read - read - teacher_tokens
        measured.gather()
        norm = self._model.clip_gradients(self._recipe.max_grad_norm)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._model.updated("student")
        if self._model.has("ema"):
            update_average(self._model.parameters("ema"), self.parameters, self._recipe.teacher_update_rate)
            self._model.updated("ema")
        return StepFigures(
            loss=measured.loss,
            teacher_kl=_mean(measured.lessons),
            rehearsal_kl=_mean(measured.rehearsal),
            base_kl=_mean(measured.base),
            entropy=_mean(measured.entropies),
            importance=measured.importance(self._importance_clip),
            grad_norm=norm,
            teacher_tokens=int(distributed.add_up(teacher_tokens)),
            student_tokens=int(distributed.add_up(student_tokens)),
            scored_tokens=sum(len(row) for row in measured.entropies),
            teacher_seconds=scored_at - started,
            student_seconds=time.monotonic() - scored_at,
        )

    @torch.no_grad()
    def _base_states(self, sequences: Sequence[Training]) -> dict[int, Tensor]:
        """The bare base's states of what the student drew."""
        drawn = [s for s in sequences if s.logprobs is not None]
        with self._model.using(None):
            states = all_response_states(self._model, [(s.prompt, s.response) for s in drawn])
        return dict(zip(map(id, drawn), states, strict=True))

    def _backward(
        self,
        mine: Sequence[tuple[Training, list[float]]],
        states: dict[int, Tensor],
        base: dict[int, Tensor],
    ) -> "_Measured":
        """Accumulate gradients of sequences with their tokens' weights; `states` and `base` by the
        sequence's identity. A backward pass follows each forward pass, as `Model.using` wants it."""
        measured = _Measured()
        with self._model.using("student"):
            for members, student in response_states(self._model, [(s.prompt, s.response) for s, _ in mine]):
                totals = []
                for rehearsal in (False, True):
                    part = _Part(
                        [
                            (mine[index][0], hidden, mine[index][1])
                            for index, hidden in zip(members, student, strict=True)
                            if mine[index][0].rehearsal == rehearsal
                        ]
                    )
                    if part.members:
                        result = self._loss(part, states)
                        totals.append(result.total)
                        measured.add(result, rehearsal=rehearsal)
                        self._compare_with_base(part, base, measured)
                total = torch.stack(totals).sum()
                total.backward()
                measured.loss += total.item()
        return measured

    def _loss(self, part: "_Part", states: dict[int, Tensor]) -> TokenLoss:
        recipe, model = self._recipe, self._model
        rehearsal = part.members[0][0].rehearsal
        if not rehearsal and self._plan.loss != "divergence":
            targets = part.targets()
            return cross_entropy_loss(
                part.student(), targets, model.head, part.weights(), dynamic=self._plan.loss == "dynamic"
            )
        return divergence_loss(
            part.student(),
            part.states(states),
            model.head,
            part.weights(),
            recipe.temperature,
            self._compare,
            teacher_head=model.head_of(model.parent() if rehearsal else self._teacher.adapter),
            drawn=part.drawn(self._importance_clip),
        )

    def _compare_with_base(self, part: "_Part", base: dict[int, Tensor], measured: "_Measured") -> None:
        own = _Part([member for member in part.members if id(member[0]) in base])
        if own.members:
            with torch.no_grad():
                result = divergence_loss(
                    own.student(),
                    own.states(base),
                    self._model.head,
                    own.weights(),
                    self._recipe.temperature,
                    reverse_kl,
                    teacher_head=self._model.head_of(None),
                )
            measured.base.append(result.per_token)

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint needs: student, average, both moments. All processes ask alike; the tensors
        are whole on the first one."""
        saved = {}
        for name, parameter in self.parameters.items():
            saved[f"student/{name}"] = self._model.whole(name, parameter)
            for moment, value in self._adam.state[parameter].items():
                saved[f"adam.{moment}/{name}"] = self._model.whole(name, value)
        if self._model.has("ema"):
            for name, parameter in self._model.parameters("ema").items():
                saved[f"ema/{name}"] = self._model.whole(name, parameter)
        return saved

    @torch.no_grad()
    def restore(self, saved: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self._model.part(name, saved[f"student/{name}"]))
            for moment in ("step", "exp_avg", "exp_avg_sq"):
                # There are none before the first step with an unmasked token.
                if f"adam.{moment}/{name}" in saved:
                    value = self._model.part(name, saved[f"adam.{moment}/{name}"]).clone()
                    # AdamW counts steps on the CPU.
                    self._adam.state[parameter][moment] = (
                        value if moment == "step" else value.to(parameter.device)
                    )
        self._model.updated("student")
        if self._model.has("ema"):
            for name, parameter in self._model.parameters("ema").items():
                parameter.copy_(self._model.part(name, saved[f"ema/{name}"]))
            self._model.updated("ema")


class _Part:
    """Sequences of one forward pass and one kind, with their student states and token weights."""

    def __init__(self, members: list[tuple[Training, Tensor, list[float]]]) -> None:
        self.members = members

    def student(self) -> Tensor:
        return torch.cat([hidden[self._kept(s, hidden)] for s, hidden, _ in self.members])

    def states(self, found: dict[int, Tensor]) -> Tensor:
        return torch.cat([found[id(s)][self._kept(s, hidden)] for s, hidden, _ in self.members])

    def weights(self) -> Tensor:
        return self._flat([row for _, _, row in self.members], torch.float32)

    def targets(self) -> Tensor:
        return self._flat([s.response for s, _, _ in self.members], torch.long)

    def drawn(self, clip: float | None) -> Drawn | None:
        """For importance weights of tokens that an earlier student, or another engine, drew."""
        if clip is None:
            return None
        unknown = [s.logprobs or [math.nan] * len(s.response) for s, _, _ in self.members]
        return Drawn(self.targets(), self._flat(unknown, torch.float32), clip)

    def _flat(self, rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        """The unmasked tokens' values one after another."""
        kept = [
            value
            for (s, _, _), row in zip(self.members, rows, strict=True)
            for value, keep in zip(row, s.mask, strict=True)
            if keep
        ]
        return torch.tensor(kept, dtype=dtype, device=self.members[0][1].device)

    @staticmethod
    def _kept(sequence: Training, hidden: Tensor) -> Tensor:
        return torch.tensor(sequence.mask, device=hidden.device)


class _Measured:
    """Per-token figures of one step."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.lessons: list[Tensor] = []
        self.rehearsal: list[Tensor] = []
        self.base: list[Tensor] = []
        self.entropies: list[Tensor] = []
        self.ratios: list[Tensor] = []

    def add(self, result: TokenLoss, *, rehearsal: bool) -> None:
        (self.rehearsal if rehearsal else self.lessons).append(result.per_token)
        self.entropies.append(result.entropy)
        self.ratios.append(result.ratio)

    def importance(self, clip: float | None) -> Importance | None:
        ratios = torch.cat(self.ratios)
        ratios = ratios[~ratios.isnan()]
        if clip is None or not ratios.numel():
            return None
        return Importance(float(ratios.mean()), float(ratios.max()), float((ratios > clip).float().mean()))

    def gather(self) -> None:
        """Take in the other processes' figures."""
        self.loss = distributed.add_up(self.loss)
        for rows in (self.lessons, self.rehearsal, self.base, self.entropies, self.ratios):
            rows[:] = [distributed.concatenate(torch.cat([torch.empty(0), *(row.cpu() for row in rows)]))]


def _mean(values: list[Tensor]) -> float | None:
    together = torch.cat(values)
    return float(together.mean()) if together.numel() else None
