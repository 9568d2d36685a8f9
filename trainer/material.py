"""What an update trains on: its lessons and rehearsal prompts as tokens, and the sequences of each step."""

from collections.abc import Sequence

from domain.errors import TrainingRefused
from domain.skill import Grader
from domain.training import TrainingJob
from trainer.batches import Batch, Schedule
from trainer.checkpoints import PendingSample
from trainer.contexts import Lesson, build_lesson, build_text, chat_tokens
from trainer.methods import plan_of
from trainer.model import Model
from trainer.neighbours import Neighbours
from trainer.rollout import Rollouts, Sampling
from trainer.sequences import Training, loss_mask


class Material:
    """Lessons, held-out items and rehearsal prompts of one job, and the schedule over them."""

    def __init__(self, job: TrainingJob, model: Model, rollouts: Rollouts) -> None:
        """Raises TrainingRefused when there is nothing to train on or a teacher context can't be built."""
        self._recipe, self._model, self._rollouts = job.recipe, model, rollouts
        self._plan = plan_of(job.recipe)
        self.lessons: list[Lesson] = []
        self.holdout: list[tuple[Grader, Lesson]] = []
        for skill in job.skills:
            neighbours = Neighbours(skill.train, job.recipe)
            for place, demonstration in enumerate([*skill.train, *skill.holdout]):
                held_out = place >= len(skill.train)
                if self._plan.responses == "text" and not held_out:
                    lesson = build_text(model.tokenizer, skill.name, demonstration)
                else:
                    others = neighbours.of(demonstration)
                    lesson = build_lesson(model.tokenizer, skill.name, demonstration, others, job.recipe)
                if held_out:
                    self.holdout.append((skill.grader, lesson))
                else:
                    self.lessons.append(lesson)
        if not self.lessons:
            raise TrainingRefused("The update has no demonstrations to train on.", code="nothing_to_teach")
        rehearses = job.recipe.rehearsal_share > 0 or job.recipe.reinvoke_steps > 0
        self.rehearsal = [chat_tokens(model.tokenizer, m) for m in job.rehearsal] if rehearses else []
        if job.recipe.reinvoke_steps and not self.rehearsal:
            raise TrainingRefused(
                "Method 'sft_reinvoke' ends with rehearsal and there are no rehearsal prompts.",
                param="recipe.reinvoke_steps",
                code="no_rehearsal_prompts",
            )
        self.schedule = Schedule(job.recipe, len(self.lessons), len(self.rehearsal))
        self.targets: list[PendingSample] | None = None
        """Per lesson the teacher's own answer, where the method trains on it; see `draw_targets`."""

    def draw_targets(self) -> None:
        """Where the method wants them: one answer of the parent, shown the demonstration, per lesson."""
        if self._plan.responses == "teacher":
            prompts = [lesson.teacher_prompt for lesson in self.lessons]
            self.targets = self._draw(prompts, [self._recipe.max_new_tokens] * len(prompts), -1, teacher=True)

    def draw_round(self, first: int) -> dict[int, list[PendingSample]]:
        """The student's answers for 0-based step `first` and the `rollout_every` - 1 after it, on lessons
        and rehearsal prompts together; each step's own, lessons first."""
        recipe = self._recipe
        steps = range(first, min(first + recipe.rollout_every, self.schedule.steps))
        prompts: list[list[int]] = []
        limits: list[int] = []
        counts: list[int] = []
        for step in steps:
            batch = self.schedule.batch(step)
            prompts += [self.lessons[i].prompt for i in batch.on_policy]
            prompts += [self.rehearsal[i] for i in batch.rehearsal]
            limits += [recipe.max_new_tokens] * len(batch.on_policy)
            limits += [recipe.max_rehearsal_tokens] * len(batch.rehearsal)
            counts.append(len(batch.on_policy) + len(batch.rehearsal))
        left = self._draw(prompts, limits, first, teacher=False)
        drawn: dict[int, list[PendingSample]] = {}
        for step, count in zip(steps, counts, strict=True):
            drawn[step], left = left[:count], left[count:]
        return drawn

    def _draw(
        self, prompts: list[list[int]], limits: list[int], step: int, *, teacher: bool
    ) -> list[PendingSample]:
        recipe = self._recipe
        sampling = Sampling(recipe.temperature, recipe.top_p, recipe.seed * 1_000_003 + step + 1)
        drawn = self._rollouts.draw(self._model.parent() if teacher else "student", prompts, limits, sampling)
        return [PendingSample(tokens=s.tokens, truncated=s.truncated, logprobs=s.logprobs) for s in drawn]

    def sequences(self, batch: Batch, samples: Sequence[PendingSample]) -> list[Training]:
        """The step's sequences; `samples` are its own of `draw_round`."""
        given = [self._given(index) for index in batch.off_policy]
        drawn = [self._drawn(i, s) for i, s in zip(batch.on_policy, samples, strict=False)]
        rehearsed = zip(batch.rehearsal, samples[len(batch.on_policy) :], strict=True)
        return [*given, *drawn, *(self._rehearsed(index, s) for index, s in rehearsed)]

    def _given(self, index: int) -> Training:
        """A lesson with tokens that never change: the demonstration's own, or the teacher's answer."""
        target = self.targets[index] if self.targets else None
        response = target.tokens if target else self.lessons[index].response
        return self._lesson(index, response, truncated=bool(target and target.truncated), fixed=True)

    def _drawn(self, index: int, drawn: PendingSample) -> Training:
        return self._lesson(
            index,
            drawn.tokens,
            truncated=drawn.truncated,
            fixed=False,
            logprobs=drawn.logprobs,
            share=1 / self._recipe.rollouts_per_prompt,
        )

    def _lesson(
        self,
        index: int,
        response: list[int],
        *,
        truncated: bool,
        fixed: bool,
        logprobs: list[float] | None = None,
        share: float = 1.0,
    ) -> Training:
        lesson = self.lessons[index]
        # A supervised method learns its targets from the first token; what the mask hides is the
        # teacher's habit of prefacing an answer.
        skip = self._recipe.skip_first_tokens if self._plan.loss == "divergence" else 0
        return Training(
            prompt=lesson.prompt,
            teacher_prompt=lesson.teacher_prompt,
            shared_tokens=lesson.shared_tokens,
            response=response,
            rehearsal=False,
            lesson=index if fixed else None,
            mask=loss_mask(response, skip_first=skip, truncated=truncated),
            logprobs=logprobs,
            share=share,
        )

    def _rehearsed(self, index: int, drawn: PendingSample) -> Training:
        # A general answer is longer than max_rehearsal_tokens as a rule: its beginning is rehearsed.
        # Neither mask applies, since this teacher has no demonstration to leak.
        prompt = self.rehearsal[index]
        return Training(
            prompt=prompt,
            teacher_prompt=prompt,
            shared_tokens=0,
            response=drawn.tokens,
            rehearsal=True,
            lesson=None,
            mask=loss_mask(drawn.tokens, skip_first=0, truncated=False),
            logprobs=drawn.logprobs,
        )
