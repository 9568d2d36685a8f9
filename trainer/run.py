"""A training job from its first check to its adapter: the story top to bottom."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from domain.errors import TrainingFailed
from domain.failpoint import failpoint
from domain.preflight import PreflightReport
from domain.training import (
    CheckpointLine,
    DoneLine,
    HoldoutLine,
    PreflightLine,
    StepLine,
    TrainerLine,
    TrainingJob,
)
from trainer import checkpoints, distributed
from trainer.best import BestWeights
from trainer.checkpoints import Checkpoint, PendingSample, State
from trainer.loading import load_model
from trainer.material import Material
from trainer.model import Model
from trainer.optimize import Optimizer, StepFigures
from trainer.preflight import examine, refuse
from trainer.preflight_gap import student_answers
from trainer.remote_rollout import RemoteRollouts
from trainer.rollout import OwnRollouts, Rollouts
from trainer.teacher import Teacher

log = logging.getLogger(__name__)

SERVER_IMPORTANCE_CLIP = 2.0
"""Where the recipe has no `importance_clip` and another engine than the trainer drew."""

Emit = Callable[[TrainerLine], None]


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


def train(job: TrainingJob, emit: Emit, stop_requested: Callable[[], bool]) -> None:
    """Run `job` to its adapter in `output_dir`, resuming from its newest checkpoint that verifies.

    Raises TrainingRefused when preflight or a rollout server gives a reason not to train, Interrupted after
    `stop_requested`, TrainingFailed when the rollout server is away; a checkpoint is left after these two.
    """
    recipe = job.recipe
    model = load_model(
        Path(job.base_path), recipe, Path(job.parent_adapter_path) if job.parent_adapter_path else None
    )
    run = Run(job, model, emit)
    if not run.resume():
        report = run.examine()
        emit(PreflightLine(**report.model_dump()))
        refuse(report)
        if distributed.any_of(stop_requested()):  # nothing to write yet
            raise Interrupted
        run.begin()
    while not run.finished:
        try:
            run.take_step()
        except TrainingFailed:
            if run.step:
                run.save()
            raise
        failpoint("trainer.step")
        if distributed.any_of(stop_requested()) and not run.finished:
            run.save()
            raise Interrupted
        if run.step % recipe.checkpoint_every == 0:
            run.save()
    run.finish()


class Run:
    """The state of one job between steps."""

    def __init__(self, job: TrainingJob, model: Model, emit: Emit) -> None:
        self._job, self._recipe, self._model, self._emit = job, job.recipe, model, emit
        self._rollouts: Rollouts = RemoteRollouts(job, model) if job.rollout_url else OwnRollouts(model)
        self.material = Material(job, model, self._rollouts)
        self.teacher = Teacher(model, job.recipe)
        clip = job.recipe.importance_clip
        if clip is None and job.rollout_url:
            clip = SERVER_IMPORTANCE_CLIP
        self._optimizer = Optimizer(model, job.recipe, self.teacher, clip)
        self._best = BestWeights(model)
        self._pending: dict[int, list[PendingSample]] = {}
        self.step = 0
        self.seconds = 0.0

    def examine(self) -> PreflightReport:
        """Preflight of this job on the student as it is now."""
        return examine(
            self._job,
            self._model,
            self.teacher,
            lessons=self.material.lessons,
            holdout=self.material.holdout,
            rehearsal=self.material.rehearsal,
            steps=self.material.schedule.steps,
        )

    @property
    def finished(self) -> bool:
        """All steps are taken, or the held-out score has stopped rising."""
        patience = self._recipe.early_stop_patience
        return self.step >= self.material.schedule.steps or self._best.misses >= patience

    def begin(self) -> None:
        """What is drawn once, before the first step."""
        self.material.draw_targets()

    def resume(self) -> bool:
        """Continue from the newest checkpoint that verifies; False when there is none."""
        found = checkpoints.load_newest(Path(self._job.checkpoint_dir), self._job.fingerprint())
        if not distributed.agree(found.state.step if found else 0):
            raise RuntimeError("The processes found different checkpoints; checkpoint_dir must be shared.")
        if found is None:
            return False
        self._optimizer.restore(found.tensors)
        self._best.restore(found.state.best, found.tensors)
        self.step, self.seconds = found.state.step, found.state.seconds
        self._pending = found.state.pending
        self.material.targets = found.state.targets
        self._emit(CheckpointLine(step=self.step, resumed=True))
        return True

    def save(self) -> None:
        state = State(
            step=self.step,
            fingerprint=self._job.fingerprint(),
            pending=self._pending,
            seconds=self.seconds,
            targets=self.material.targets,
            best=self._best.score,
        )
        tensors = self._optimizer.tensors() | self._best.tensors()
        if distributed.is_first():
            checkpoints.save(Path(self._job.checkpoint_dir), Checkpoint(state, tensors))
        self._emit(CheckpointLine(step=self.step))

    def finish(self) -> None:
        """Write the student, or the best of the weights that were scored."""
        self._best.put_back()
        self._model.save_student(Path(self._job.output_dir), self._job.base_model)
        self._emit(DoneLine(steps=self.step, seconds=self.seconds))

    def take_step(self) -> None:
        """One optimizer step and its line of metrics; with early stopping also the held-out score."""
        started, read = time.monotonic(), self._model.tokens_read
        schedule = self.material.schedule
        batch = schedule.batch(self.step)
        begins_round = self.step not in self._pending
        if begins_round:
            self._pending |= self.material.draw_round(self.step)
        samples = self._pending.pop(self.step)
        rolled_out = time.monotonic()
        rollout_tokens = int(distributed.add_up(self._model.tokens_read - read))
        rate = schedule.learning_rate(self.step)
        base_every = self._recipe.kl_to_base_every
        measure_base = base_every > 0 and self.step % base_every == 0 and self._model.has(None)
        sequences = self.material.sequences(batch, samples)
        figures = self._optimizer.step(sequences, rate, measure_base=measure_base)
        ratio = figures.importance
        on_policy = samples[: len(batch.on_policy)]
        self.step += 1
        self.seconds += time.monotonic() - started
        self._emit(
            StepLine(
                step=self.step,
                steps=schedule.steps,
                loss=figures.loss,
                teacher_kl=figures.teacher_kl,
                rehearsal_kl=figures.rehearsal_kl,
                base_kl=figures.base_kl,
                entropy=figures.entropy,
                response_tokens=_mean([len(s.tokens) for s in on_policy]),
                truncated_share=_mean([s.truncated for s in on_policy]),
                tokens=sum(len(s.prompt) + len(s.response) for s in sequences),
                flops=self._flops(figures, rollout_tokens),
                grad_norm=figures.grad_norm,
                learning_rate=rate,
                rollout_seconds=rolled_out - started,
                rollout_gap=self._rollouts.gap if begins_round else None,
                importance_mean=ratio.mean if ratio else None,
                importance_max=ratio.max if ratio else None,
                importance_clipped=ratio.clipped_share if ratio else None,
                teacher_seconds=figures.teacher_seconds,
                student_seconds=figures.student_seconds,
                eta_seconds=self.seconds / self.step * (schedule.steps - self.step),
            )
        )
        every = self._recipe.early_stop_every
        if every and (self.step % every == 0 or self.step == schedule.steps):
            self._score_holdout()

    def _flops(self, figures: StepFigures, rollout_tokens: int) -> float:
        """Of the matrix products with weights, padding included: 2 a parameter and token forward, as many
        again for the gradient in the activations, and in the weights where they train. Attention's own
        products, a few per cent at these lengths, and the adapters are left out."""
        passes = 3 if self._recipe.lora_rank == 0 else 2
        read = rollout_tokens + figures.teacher_tokens + passes * figures.student_tokens
        # Output layer: every rollout pass's last state at least; teacher, student and its gradient.
        return 2.0 * (
            read * self._model.trunk_parameters
            + (rollout_tokens + 3 * figures.scored_tokens) * self._model.head_of("student").numel()
        )

    def _score_holdout(self) -> None:
        started = time.monotonic()
        answers = student_answers(self._model, self._recipe, self.material.holdout)
        if answers.score is None:
            return  # nothing is held out; preflight has warned of it
        self._best.hear(self.step, answers.score)
        self.seconds += time.monotonic() - started
        best = self._best.score
        assert best is not None
        self._emit(
            HoldoutLine(
                step=self.step,
                items=len(answers.scores),
                score=answers.score,
                best_step=best.step,
                best_score=best.value,
            )
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
