"""The folder that `ratchet train` fills: while it trains, when it goes on, and when it is done.

metrics.jsonl    every line of the trainer's, in order, those of a part that was trained again only once
job.json, trainer.log, checkpoints/, model.partial/    until it is done
the model's files, training.json    when it is done; training.json is written last
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cli.errors import CliError
from cli.training_inputs import Inputs
from domain.preflight import PreflightReport
from domain.recipe import Recipe
from domain.training import (
    TRAINER_LINE,
    CheckpointLine,
    DoneLine,
    HoldoutLine,
    PreflightLine,
    StepLine,
    TrainerLine,
    TrainingJob,
)


class TrainingRecord(BaseModel):
    """training.json: how the model beside it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: str
    parent: str | None
    """Folder of the model that the training started from; None for the base itself."""
    demonstrations: str
    demonstrations_sha256: str
    train: int
    holdout: int
    """Demonstrations trained on and held out."""
    recipe: Recipe
    fingerprint: str
    """sha256 over recipe, demonstrations and rehearsal: equal fingerprints, equal training."""
    steps: int
    seconds: float
    """Of training alone, over all its parts."""
    metrics: StepLine
    """Of the last step."""
    early_stop: HoldoutLine | None
    """The last score on held-out items, where the recipe stops early: the best step's weights are saved."""
    preflight: PreflightReport


class OutputFolder:
    """One training's folder, which no other process trains into at the same time."""

    def __init__(self, folder: Path, checkpoints: Path | None, inputs: Inputs) -> None:
        self._folder = folder.resolve()
        self._checkpoints = (checkpoints or self._folder / "checkpoints").resolve()
        self._keeps_checkpoints = checkpoints is not None
        self._inputs = inputs
        self.job = inputs.job.model_copy(
            update={
                "checkpoint_dir": str(self._checkpoints),
                "output_dir": str(self._folder / "model.partial"),
            }
        )
        self.job_file = self._folder / "job.json"
        self.log_file = self._folder / "trainer.log"
        self._metrics = self._folder / "metrics.jsonl"
        self._record = self._folder / "training.json"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Raises CliError when the folder cannot be written, is in use, or holds another training."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._folder, os.O_RDONLY)
        except OSError as error:
            raise CliError(f"--out {self._folder} cannot be written: {error.strerror}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CliError(f"--out {self._folder} is in use by another training") from error
            self._require_ours()
            shutil.rmtree(self.job.output_dir, ignore_errors=True)
            self.job_file.write_text(self.job.model_dump_json(), encoding="utf-8")
            yield
        finally:
            os.close(lock)

    def finished(self) -> TrainingRecord | None:
        """The record of this very training when it is done already. Raises CliError for another's."""
        if not self._record.exists():
            return None
        try:
            record = TrainingRecord.model_validate_json(self._record.read_bytes())
        except ValueError as error:
            raise CliError(f"{self._record} is not a training's record: {error}") from error
        if record.fingerprint != self.job.fingerprint():
            raise CliError(
                f"--out {self._folder} holds a finished training with {self._difference(record.recipe)}: "
                "choose another folder, or remove this one"
            )
        return record

    def keep(self, line: TrainerLine) -> TrainerLine:
        """Append a line to metrics.jsonl; returns it with the places of a report named by lines.

        A training that begins again, or goes on from a checkpoint, drops what it will write anew.
        """
        match line:
            case PreflightLine():
                line = self._inputs.with_lines(line)
                self._metrics.unlink(missing_ok=True)
            case CheckpointLine(resumed=True):
                self._forget_after(line.step)
            case _:
                pass
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(line.model_dump_json() + "\n")
        return line

    def seal(self) -> TrainingRecord:
        """Put the trained model's files in place and write training.json; removes what served training."""
        lines = self.lines()
        done = next(line for line in reversed(lines) if isinstance(line, DoneLine))
        last = next(line for line in reversed(lines) if isinstance(line, StepLine))
        scored = [line for line in lines if isinstance(line, HoldoutLine)]
        report = next(line for line in lines if isinstance(line, PreflightLine))
        record = TrainingRecord(
            base_model=self.job.base_model,
            parent=self.job.parent_adapter_path,
            demonstrations=str(self._inputs.file),
            demonstrations_sha256=self._inputs.file_sha256,
            train=len(self._inputs.skill.train),
            holdout=len(self._inputs.skill.holdout),
            recipe=self.job.recipe,
            fingerprint=self.job.fingerprint(),
            steps=done.steps,
            seconds=done.seconds,
            metrics=last,
            early_stop=scored[-1] if scored else None,
            preflight=PreflightReport(**report.model_dump(exclude={"type"})),
        )
        for file in Path(self.job.output_dir).iterdir():
            file.replace(self._folder / file.name)
        Path(self.job.output_dir).rmdir()
        staged = self._folder / "training.json.partial"
        staged.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        staged.replace(self._record)
        if not self._keeps_checkpoints:
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        self.job_file.unlink()
        self.log_file.unlink()
        return record

    def lines(self) -> list[TrainerLine]:
        """metrics.jsonl as written so far, without a last line that a kill has cut."""
        if not self._metrics.exists():
            return []
        whole = self._metrics.read_bytes().split(b"\n")[:-1]
        return [TRAINER_LINE.validate_json(raw) for raw in whole]

    def _forget_after(self, step: int) -> None:
        """Drop what was written after the checkpoint that the training goes on from."""
        kept = [
            line
            for line in self.lines()
            if not isinstance(line, StepLine | HoldoutLine | CheckpointLine) or line.step <= step
        ]
        staged = self._metrics.with_suffix(".partial")
        staged.write_text("".join(line.model_dump_json() + "\n" for line in kept), encoding="utf-8")
        staged.replace(self._metrics)

    def _require_ours(self) -> None:
        """Raises CliError when something else is here, or an unfinished training of another job: neither
        must be lost unasked."""
        if not self.job_file.exists():
            if any(self._folder.iterdir()):
                raise CliError(f"--out {self._folder} holds files of something else: choose another folder")
            return
        try:
            other = TrainingJob.model_validate_json(self.job_file.read_bytes())
        except ValueError:  # torn, or of another version of the product: no checkpoint can fit it
            return
        if other.fingerprint() != self.job.fingerprint() and any(self._checkpoints.glob("step-*")):
            raise CliError(
                f"--out {self._folder} holds an unfinished training with {self._difference(other.recipe)}: "
                "choose another folder, or remove this one"
            )

    def _difference(self, other: Recipe) -> str:
        theirs, ours = other.model_dump(), self.job.recipe.model_dump()
        changed = [f"{name} {json.dumps(value)}" for name, value in theirs.items() if value != ours[name]]
        return ", ".join(changed) or "other demonstrations, rehearsal prompts or another parent"
