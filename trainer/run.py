"""A training job from its first check to its adapter: the story top to bottom."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from domain.errors import TrainingRefused
from domain.preflight import PreflightReport
from domain.skill import Grader
from domain.training import CheckpointLine, DoneLine, PreflightLine, StepLine, TrainerLine, TrainingJob
from trainer import checkpoints
from trainer.batches import Batch, Schedule, learning_rate
from trainer.checkpoints import Checkpoint, PendingSample, State
from trainer.contexts import Lesson, build_lesson, chat_tokens
from trainer.loading import load_model
from trainer.model import Model
from trainer.optimize import Optimizer
from trainer.preflight import examine, refuse
from trainer.rollout import Sampling, sample
from trainer.sequences import Training, loss_mask
from trainer.teacher import Teacher

log = logging.getLogger(__name__)

Emit = Callable[[TrainerLine], None]


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


def train(job: TrainingJob, emit: Emit, stop_requested: Callable[[], bool]) -> None:
    """Run `job` to its adapter in `output_dir`, resuming from its newest checkpoint that verifies.

    Raises TrainingRefused when preflight finds a reason not to train, Interrupted after `stop_requested`.
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
        if stop_requested():  # nothing to write yet
            raise Interrupted
    while run.step < run.schedule.steps:
        run.take_step()
        if stop_requested() and run.step < run.schedule.steps:
            run.save()
            raise Interrupted
        if run.step % recipe.checkpoint_every == 0:
            run.save()
    model.save_student(Path(job.output_dir), job.base_model)
    emit(DoneLine(steps=run.step, seconds=run.seconds))


class Run:
    """The state of one job between steps."""

    def __init__(self, job: TrainingJob, model: Model, emit: Emit) -> None:
        recipe = job.recipe
        self._job, self._recipe, self._model, self._emit = job, recipe, model, emit
        tokenizer = model.tokenizer
        self.lessons = [build_lesson(tokenizer, s, d, recipe) for s in job.skills for d in s.train]
        self.holdout: list[tuple[Grader, Lesson]] = [
            (s.grader, build_lesson(tokenizer, s, d, recipe)) for s in job.skills for d in s.holdout
        ]
        if not self.lessons:
            raise TrainingRefused("The update has no demonstrations to train on.", code="nothing_to_teach")
        rehearsal = job.rehearsal if recipe.rehearsal_share else []
        self._rehearsal = [chat_tokens(tokenizer, messages) for messages in rehearsal]
        self.schedule = Schedule(recipe, len(self.lessons), len(self._rehearsal))
        self.teacher = Teacher(model, recipe)
        self._optimizer = Optimizer(model, recipe, self.teacher)
        self._pending: dict[int, list[PendingSample]] = {}
        self.step = 0
        self.seconds = 0.0

    def examine(self) -> PreflightReport:
        """Preflight of this job on the student as it is now."""
        return examine(
            self._job,
            self._model,
            self.teacher,
            lessons=self.lessons,
            holdout=self.holdout,
            rehearsal=self._rehearsal,
            steps=self.schedule.steps,
        )

    def resume(self) -> bool:
        """Continue from the newest checkpoint that verifies; False when there is none."""
        found = checkpoints.load_newest(Path(self._job.checkpoint_dir), self._job.fingerprint())
        if found is None:
            return False
        self._optimizer.restore(found.tensors)
        self.step, self.seconds = found.state.step, found.state.seconds
        self._pending = found.state.pending
        self._emit(CheckpointLine(step=self.step, resumed=True))
        return True

    def save(self) -> None:
        state = State(
            step=self.step, fingerprint=self._job.fingerprint(), pending=self._pending, seconds=self.seconds
        )
        checkpoints.save(Path(self._job.checkpoint_dir), Checkpoint(state, self._optimizer.tensors()))
        self._emit(CheckpointLine(step=self.step))

    def take_step(self) -> None:
        """One optimizer step and its line of metrics."""
        started = time.monotonic()
        batch = self.schedule.batch(self.step)
        if self.step not in self._pending:
            self._sample_round()
        samples = self._pending.pop(self.step)
        rolled_out = time.monotonic()
        rate = learning_rate(self._recipe, self.step, self.schedule.steps)
        figures = self._optimizer.step(self._sequences(batch, samples), rate)
        on_policy = samples[: len(batch.on_policy)]
        self.step += 1
        self.seconds += time.monotonic() - started
        self._emit(
            StepLine(
                step=self.step,
                steps=self.schedule.steps,
                loss=figures.loss,
                teacher_kl=figures.teacher_kl,
                rehearsal_kl=figures.rehearsal_kl,
                entropy=figures.entropy,
                response_tokens=_mean([len(s.tokens) for s in on_policy]),
                truncated_share=_mean([s.truncated for s in on_policy]),
                grad_norm=figures.grad_norm,
                learning_rate=rate,
                rollout_seconds=rolled_out - started,
                teacher_seconds=figures.teacher_seconds,
                student_seconds=figures.student_seconds,
                eta_seconds=self.seconds / self.step * (self.schedule.steps - self.step),
            )
        )

    def _sample_round(self) -> None:
        """The student's answers for this step and the `rollout_every` - 1 after it, on lessons and
        rehearsal prompts together."""
        steps = range(self.step, min(self.step + self._recipe.rollout_every, self.schedule.steps))
        recipe = self._recipe
        prompts: list[list[int]] = []
        limits: list[int] = []
        counts: list[int] = []
        for step in steps:
            batch = self.schedule.batch(step)
            prompts += [self.lessons[i].prompt for i in batch.on_policy]
            prompts += [self._rehearsal[i] for i in batch.rehearsal]
            limits += [recipe.max_new_tokens] * len(batch.on_policy)
            limits += [recipe.max_rehearsal_tokens] * len(batch.rehearsal)
            counts.append(len(batch.on_policy) + len(batch.rehearsal))
        sampling = Sampling(recipe.temperature, recipe.top_p, recipe.seed * 1_000_003 + self.step)
        with self._model.using("student"):
            drawn = sample(self._model, prompts, limits, sampling)
        left = [PendingSample(tokens=s.tokens, truncated=s.truncated) for s in drawn]
        for step, count in zip(steps, counts, strict=True):
            self._pending[step], left = left[:count], left[count:]

    def _sequences(self, batch: Batch, samples: list[PendingSample]) -> list[Training]:
        own = [self._lesson(index, None) for index in batch.off_policy]
        drawn = [self._lesson(i, s) for i, s in zip(batch.on_policy, samples, strict=False)]
        rehearsed = zip(batch.rehearsal, samples[len(batch.on_policy) :], strict=True)
        return [*own, *drawn, *(self._rehearse(index, s) for index, s in rehearsed)]

    def _lesson(self, index: int, drawn: PendingSample | None) -> Training:
        """The lesson with the student's sample, or without one with its demonstration's own tokens."""
        lesson = self.lessons[index]
        response = drawn.tokens if drawn else lesson.response
        return Training(
            prompt=lesson.prompt,
            teacher_prompt=lesson.teacher_prompt,
            shared_tokens=lesson.shared_tokens,
            response=response,
            rehearsal=False,
            lesson=None if drawn else index,
            mask=loss_mask(
                response,
                skip_first=self._recipe.skip_first_tokens,
                truncated=drawn.truncated if drawn else False,
            ),
        )

    def _rehearse(self, index: int, drawn: PendingSample) -> Training:
        # A general answer is longer than max_rehearsal_tokens as a rule: its beginning is rehearsed.
        # Neither mask applies, since this teacher has no demonstration to leak.
        prompt = self._rehearsal[index]
        return Training(
            prompt=prompt,
            teacher_prompt=prompt,
            shared_tokens=0,
            response=drawn.tokens,
            rehearsal=True,
            lesson=None,
            mask=loss_mask(drawn.tokens, skip_first=0, truncated=False),
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
