"""A sequential study on disk: its arms, its settings, and one line for each measured version.

FOLDER/study.json       settings, the same for all lines
FOLDER/results.jsonl    one StageResult a line
FOLDER/lineages/ARM/seedN/STAGE-SKILL/   adapter, every step's figures, checkpoints while it trains
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from domain.recipe import Recipe

BASE = "base"
"""Name of the arm that is the untrained model: stage 0 of every lineage."""
PASS_SAMPLES = 32
PASS_KS = (1, 2, 4, 8, 16, 32)

Role = Literal["sdft", "sft", "sft_rehearsal", "control", "ablation"]
"""Arms of the first three roles are candidates of one method: the best on the dev split speaks for it."""


class Arm(BaseModel):
    """One recipe under study: `Recipe.small_model()` with `changes`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role
    changes: dict[str, JsonValue] = Field(default_factory=dict)
    rollouts: Literal["local", "server"] = "local"
    """Who draws the student's answers: the trainer, or the server at --rollout-url."""

    def recipe(self, seed: int, steps: int | None) -> Recipe:
        """Raises pydantic.ValidationError for a change that no recipe has.

        `on_small_gap` is `train`: a study wants the result that the product would refuse to make.
        """
        changed: dict[str, Any] = {**self.changes, "seed": seed, "on_small_gap": "train"}
        if steps is not None:
            changed["max_steps"] = steps
        return Recipe.model_validate({**Recipe.small_model().model_dump(), **changed})


_ARMS: TypeAdapter[dict[str, Arm]] = TypeAdapter(dict[str, Arm])


class StudySettings(BaseModel):
    """What makes two lines comparable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: str
    skills: list[str]
    """In the order in which they are taught; stage 1 teaches the first."""
    steps: int | None
    """Most optimizer steps a stage; None leaves them to the recipe."""
    eval_rows: int
    general_items: int
    pass_items: int


class TrainingFigures(BaseModel):
    """One stage's training."""

    model_config = ConfigDict(frozen=True)

    steps: int
    seconds: float
    student_score: float | None
    teacher_score: float | None
    """Preflight's, on held-out items: before training, without and with a demonstration; None where the
    method has no teacher."""
    teacher_kl: float | None
    rehearsal_kl: float | None
    response_tokens: float
    """Means over the last ten steps, as the trainer reports them; None where they had no such token."""


class StageResult(BaseModel):
    """One version, measured; scores are by suite and item."""

    model_config = ConfigDict(frozen=True)

    arm: str
    seed: int
    stage: int
    """0 is the base, k the version after the study's k-th skill."""
    role: Role | None
    """None for the base."""
    changes: dict[str, JsonValue]
    training: TrainingFigures | None
    skills: dict[str, dict[str, float]]
    outputs: dict[str, dict[str, str]]
    """The graded answers, by skill and item."""
    answer_tokens: dict[str, float]
    """Mean length of the greedy answers to each skill's items; a long one is cut off."""
    dev: dict[str, float]
    """The taught skill's dev items, which nothing trained on."""
    general: dict[str, dict[str, float]]
    """The benchmarks' accuracies, and `likelihood`: the probability given to the right option."""
    ordinary: dict[str, float]
    """1 where an ordinary prompt is not answered in a taught skill's format."""
    ordinary_outputs: dict[str, str]
    kl_to_base: dict[str, float]
    """By ordinary prompt: KL(base || version) in nats per token of the base's own sample."""
    passes: dict[str, dict[str, int]]
    """By skill and item: right answers of PASS_SAMPLES at temperature 1."""
    seconds: dict[str, float]
    """What each part of the measuring took."""


Key = tuple[str, int, int]
"""Arm, seed, stage."""


def load_arms(file: Path, names: list[str] | None) -> dict[str, Arm]:
    """The file's arms, or those in `names`, each with a recipe that validates.

    Raises ValueError naming the file and the arm.
    """
    try:
        arms = _ARMS.validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise ValueError(f"{file}: {error}") from error
    unknown = sorted({*(names or ())} - arms.keys())
    if unknown or BASE in arms:
        raise ValueError(
            f"{file} has no arm {', '.join(unknown)}" if unknown else f"{file}: {BASE!r} is no arm's name"
        )
    chosen = {name: arms[name] for name in names or arms}
    for name, arm in chosen.items():
        try:
            arm.recipe(0, None)
        except ValidationError as error:
            raise ValueError(f"{file}, arm {name!r}: {error}") from error
    return chosen


class Study:
    """The folder: settings checked once, results appended whole."""

    def __init__(self, folder: Path, settings: StudySettings) -> None:
        """Open or begin. Raises ValueError naming the setting in which the folder's study differs."""
        self.folder = folder
        self.settings = settings
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "study.json"
        if file.exists():
            begun = StudySettings.model_validate_json(file.read_bytes())
            for name in StudySettings.model_fields:
                there, asked = getattr(begun, name), getattr(settings, name)
                if there != asked:
                    raise ValueError(f"{file} has {name} {there}, not {asked}: choose another --out")
        else:
            file.write_text(settings.model_dump_json(indent=2) + "\n")
        self.results = self._read()

    @property
    def results_file(self) -> Path:
        return self.folder / "results.jsonl"

    def stage_folder(self, arm: str, seed: int, stage: int) -> Path:
        skill = self.settings.skills[stage - 1]
        return self.folder / "lineages" / arm / f"seed{seed}" / f"{stage}-{skill}"

    def append(self, result: StageResult) -> None:
        """Durable when it returns; several processes may append to one study."""
        with self.results_file.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(result.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.results[result.arm, result.seed, result.stage] = result

    def check_arm(self, name: str, arm: Arm) -> None:
        """Raises ValueError when the study has results of another recipe under this name."""
        for (known, _, _), result in self.results.items():
            if known == name and result.changes != arm.changes:
                raise ValueError(
                    f"{self.results_file} has arm {name!r} with {json.dumps(result.changes)}, not "
                    f"{json.dumps(arm.changes)}: give the arm another name"
                )

    def _read(self) -> dict[Key, StageResult]:
        """A line that a kill cut short is dropped from the file: its stage is measured again."""
        if not self.results_file.exists():
            return {}
        with self.results_file.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            file.truncate(whole)
        found = [StageResult.model_validate_json(line) for line in content[:whole].splitlines()]
        return {(result.arm, result.seed, result.stage): result for result in found}
