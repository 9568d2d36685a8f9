"""One version of a study, measured: every skill, the general suite, drift from the base, pass@k."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.measuring import Asked, BaseReference, BatchCompleter, correct_samples, item_asked
from benchmarks.skill_data import StudiedSkill, evenly_spaced
from benchmarks.study import PASS_SAMPLES, Arm, StageResult, TrainingFigures
from benchmarks.teaching import Subject
from domain.demonstration import Message
from domain.measurement import Measurement
from domain.recipe import Recipe
from evaluation.benchmarks import OrdinaryPrompt
from evaluation.leak import TaughtSkill
from evaluation.suites import (
    ORDINARY_TOKENS,
    SkillItem,
    measure_general,
    measure_ordinary,
    measure_skill,
)
from trainer.adapter_files import is_adapter
from trainer.loading import load_model
from trainer.model import Model

BESIDE = Recipe(teacher="base", parent_adapter="merge", lora_rank=1)
"""Loads a version as it is, whatever its rank; nothing is trained with it."""
SAMPLING_SEED = 0


class Version(NamedTuple):
    """What is measured; without files it is the base."""

    arm: str
    seed: int
    stage: int
    files: Path | None


class Examiner:
    """Measures versions of one base; the base's own samples are drawn once."""

    def __init__(self, subject: Subject, pass_items: int) -> None:
        """`pass_items` evenly spaced items of each skill are sampled for pass@k; 0 for none."""
        self._subject = subject
        self._pass_items = pass_items
        self._reference: BaseReference | None = None

    def measure(self, version: Version, arm: Arm | None, training: TrainingFigures | None) -> StageResult:
        """Everything about `version`; its arm and training, None for the base, are kept with it."""
        subject, stage = self._subject, version.stage
        clock = _Clock()
        if self._reference is None:
            base = load_model(subject.base, BESIDE, None)
            prompts = [_conversation(prompt) for prompt in subject.ordinary]
            self._reference = BaseReference(base, prompts, ORDINARY_TOKENS)
        clock.lap("reference")
        model = self._load(version.files)
        clock.lap("load")
        completer = BatchCompleter(model)
        dev = subject.skills[stage - 1].dev if stage else []
        taught = subject.skills[:stage]
        with model.using(model.parent()):
            items = [item for skill in subject.skills for item in skill.evaluation]
            completer.prepare_answers(
                [
                    *(item_asked(model, item) for item in [*items, *dev]),
                    *(
                        Asked(_conversation(prompt), ORDINARY_TOKENS, ORDINARY_TOKENS)
                        for prompt in subject.ordinary
                    ),
                ]
            )
            clock.lap("answers")
            completer.prepare_likelihoods(subject.benchmarks)
            clock.lap("likelihoods")
            drift = self._reference.kl(model)
            clock.lap("kl")
            passes = self._passes(model, taught or subject.skills)
            clock.lap("passes")
        skills = {skill.name: _skill(completer, skill, skill.evaluation) for skill in subject.skills}
        general = measure_general(completer, subject.benchmarks, {}) if subject.benchmarks else []
        ordinary = measure_ordinary(completer, subject.ordinary, [_taught(skill) for skill in taught], {})
        return StageResult.model_validate(
            {
                "arm": version.arm,
                "seed": version.seed,
                "stage": stage,
                "role": arm.role if arm else None,
                "changes": arm.changes if arm else {},
                "training": training,
                "skills": {name: _scores(measured) for name, measured in skills.items()},
                "outputs": {name: _outputs(measured) for name, measured in skills.items()},
                "answer_tokens": {s.name: _mean_length(completer, s.evaluation) for s in subject.skills},
                "dev": _scores(_skill(completer, taught[-1], dev)) if dev else {},
                "general": {measured.suite: _scores(measured) for measured in general},
                "ordinary": _scores(ordinary),
                "ordinary_outputs": _outputs(ordinary),
                "kl_to_base": {p.item: value for p, value in zip(subject.ordinary, drift, strict=True)},
                "passes": passes,
                "seconds": clock.seconds,
            }
        )

    def _load(self, files: Path | None) -> Model:
        """The version, as the role that `parent()` names: an adapter on the base, or in the base's place."""
        if files is None or is_adapter(files):
            return load_model(self._subject.base, BESIDE, files)
        return load_model(files, BESIDE, None)

    def _passes(self, model: Model, skills: Sequence[StudiedSkill]) -> dict[str, dict[str, int]]:
        chosen = [
            (skill, item) for skill in skills for item in evenly_spaced(skill.evaluation, self._pass_items)
        ]
        asked = [(skill.teach.grader, item) for skill, item in chosen]
        counts = correct_samples(model, asked, PASS_SAMPLES, SAMPLING_SEED) if asked else []
        found: dict[str, dict[str, int]] = {}
        for (skill, item), count in zip(chosen, counts, strict=True):
            found.setdefault(skill.name, {})[item.item] = count
        return found


class _Clock:
    """Seconds by part, each from the lap before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, part: str) -> None:
        now = time.monotonic()
        self.seconds[part] = round(now - self._since, 2)
        self._since = now


def _conversation(prompt: OrdinaryPrompt) -> list[Message]:
    return [Message(role="user", content=prompt.prompt)]


def _taught(skill: StudiedSkill) -> TaughtSkill:
    return TaughtSkill(skill.name, skill.teach.grader, [d.response for d in skill.teach.train])


def _skill(completer: BatchCompleter, skill: StudiedSkill, items: Sequence[SkillItem]) -> Measurement:
    measured = measure_skill(completer, skill.name, skill.teach.grader, items, {})
    if measured is None:
        raise ValueError(f"skill {skill.name!r} has no items to measure")
    return measured


def _scores(measured: Measurement) -> dict[str, float]:
    return {item.item: item.score for item in measured.items}


def _outputs(measured: Measurement) -> dict[str, str]:
    return {item.item: item.output for item in measured.items}


def _mean_length(completer: BatchCompleter, items: Sequence[SkillItem]) -> float:
    lengths = [completer.answer(i.demonstration.messages, i.max_tokens).tokens for i in items]
    return sum(lengths) / len(lengths)
