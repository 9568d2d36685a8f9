"""One optimizer step: teacher states, student states, the divergence, AdamW."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from domain.recipe import Recipe
from trainer.loss import TokenLoss, cross_entropy_loss, divergence_loss
from trainer.model import Model
from trainer.sequences import Training, response_states, token_weights
from trainer.teacher import Teacher, update_average


@dataclass(frozen=True)
class StepFigures:
    """Means over unmasked response tokens, nats; None where the step has no such token."""

    loss: float
    teacher_kl: float
    rehearsal_kl: float | None
    entropy: float
    grad_norm: float
    teacher_seconds: float
    student_seconds: float


class Optimizer:
    """AdamW over the student's float32 parameters, and the moving average where the recipe has one."""

    def __init__(self, model: Model, recipe: Recipe, teacher: Teacher) -> None:
        self._model = model
        self._recipe = recipe
        self._teacher = teacher
        self.parameters = model.parameters("student")
        self._adam = torch.optim.AdamW(
            list(self.parameters.values()), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )

    def step(self, sequences: Sequence[Training], learning_rate: float) -> StepFigures:
        started = time.monotonic()
        # The supervised control has no teacher for demonstrations, only for rehearsal.
        scored = [s for s in sequences if s.rehearsal or self._recipe.method == "sdft"]
        states = dict(zip(map(id, scored), self._teacher.states(scored), strict=True))
        scored_at = time.monotonic()
        loss, kinds, per_token, entropies = self._backward(sequences, states)
        norm = self._model.clip_gradients(self._recipe.max_grad_norm)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._model.updated("student")
        if self._recipe.teacher == "ema":
            update_average(self._model.parameters("ema"), self.parameters, self._recipe.teacher_update_rate)
            self._model.updated("ema")
        rehearsal = per_token[kinds]
        taught = per_token[~kinds]
        return StepFigures(
            loss=loss,
            teacher_kl=_mean(taught) or 0.0,
            rehearsal_kl=_mean(rehearsal),
            entropy=_mean(entropies) or 0.0,
            grad_norm=norm,
            teacher_seconds=scored_at - started,
            student_seconds=time.monotonic() - scored_at,
        )

    def _backward(
        self, sequences: Sequence[Training], states: dict[int, Tensor]
    ) -> tuple[float, Tensor, Tensor, Tensor]:
        """Accumulate gradients; returns the loss and, per unmasked token, rehearsal?, loss and entropy."""
        weights = token_weights([s.mask for s in sequences])
        loss, kinds, per_token, entropies = 0.0, [], [], []
        with self._model.using("student"):
            for members, student in response_states(self._model, [(s.prompt, s.response) for s in sequences]):
                totals = []
                for rehearsal in (False, True):
                    part = [
                        (sequences[index], hidden, weights[index])
                        for index, hidden in zip(members, student, strict=True)
                        if sequences[index].rehearsal == rehearsal and any(sequences[index].mask)
                    ]
                    if part:
                        result = self._loss(part, states)
                        totals.append(result.total)
                        per_token.append(result.per_token)
                        entropies.append(result.entropy)
                        kinds.append(torch.full_like(result.entropy, rehearsal, dtype=torch.bool))
                if totals:
                    total = torch.stack(totals).sum()
                    total.backward()
                    loss += total.item()
        if not per_token:
            empty = torch.empty(0)
            return 0.0, empty.bool(), empty, empty
        return loss, torch.cat(kinds), torch.cat(per_token), torch.cat(entropies)

    def _loss(self, part: list[tuple[Training, Tensor, list[float]]], states: dict[int, Tensor]) -> TokenLoss:
        kept = [torch.tensor(s.mask, device=self._model.device) for s, _, _ in part]
        student = torch.cat([hidden[keep] for (_, hidden, _), keep in zip(part, kept, strict=True)])
        weight = torch.tensor(
            [w for s, _, row in part for w, keep in zip(row, s.mask, strict=True) if keep],
            device=self._model.device,
        )
        if id(part[0][0]) not in states:
            targets = torch.tensor(
                [t for s, _, _ in part for t, keep in zip(s.response, s.mask, strict=True) if keep],
                device=self._model.device,
            )
            return cross_entropy_loss(student, targets, self._model.head, weight)
        teacher = torch.cat([states[id(s)][keep] for (s, _, _), keep in zip(part, kept, strict=True)])
        return divergence_loss(
            student, teacher, self._model.head, weight, self._recipe.temperature, self._recipe.divergence
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint needs: student, average, both moments. All processes ask alike; the tensors
        are whole on the first one."""
        saved = {}
        for name, parameter in self.parameters.items():
            saved[f"student/{name}"] = self._model.whole(name, parameter)
            for moment, value in self._adam.state[parameter].items():
                saved[f"adam.{moment}/{name}"] = self._model.whole(name, value)
        if self._recipe.teacher == "ema":
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
        if self._recipe.teacher == "ema":
            for name, parameter in self._model.parameters("ema").items():
                parameter.copy_(self._model.part(name, saved[f"ema/{name}"]))
            self._model.updated("ema")


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None
