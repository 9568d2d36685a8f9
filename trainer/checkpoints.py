"""Checkpoints: staged, flushed, sealed by a manifest, renamed; resumed from the newest that verifies."""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)

KEPT = 2
TENSORS = "tensors.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"


class PendingSample(BaseModel):
    """A drawn answer that later steps still use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: list[int]
    truncated: bool
    logprobs: list[float]


class BestScore(BaseModel):
    """The best held-out score so far and how many came after it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    """Optimizer steps done when it was measured."""
    value: float
    misses: int


class State(BaseModel):
    """What a checkpoint holds besides tensors. Randomness is derived from (seed, step), so the step is
    all the generator state there is."""

    model_config = ConfigDict(extra="forbid")

    step: int
    """Optimizer steps done."""
    fingerprint: str
    """Of the job that wrote it: another job's checkpoints are not resumed."""
    pending: dict[int, list[PendingSample]]
    """Samples by 0-based step."""
    seconds: float
    """Training time so far."""
    targets: list[PendingSample] | None = None
    """The teacher's answers per lesson, where the method trains on a fixed set of them."""
    best: BestScore | None = None


@dataclass(frozen=True)
class Checkpoint:
    state: State
    tensors: dict[str, Tensor]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-NNNNNN`; a reader sees it whole or not at all. Older ones but one are removed, and
    later ones: this job has not come so far, so they are another's, or did not verify."""
    name = f"step-{checkpoint.state.step:06d}"
    staging = folder / f".staging-{name}"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    save_file(
        {key: tensor.detach().cpu().contiguous() for key, tensor in checkpoint.tensors.items()},
        staging / TENSORS,
    )
    (staging / STATE).write_text(checkpoint.state.model_dump_json())
    manifest = {file: _sha256(staging / file) for file in (TENSORS, STATE)}
    (staging / MANIFEST).write_text(json.dumps(manifest))
    for file in (TENSORS, STATE, MANIFEST):
        _flush(staging / file)
    _flush(staging)
    final = folder / name
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
    _flush(folder)
    found = _newest_first(folder)
    place = found.index(final)
    for other in [*found[:place], *found[place + KEPT :]]:
        shutil.rmtree(other)
    return final


def load_newest(folder: Path, fingerprint: str) -> Checkpoint | None:
    """The newest checkpoint of this job whose files match their manifest; None when there is none."""
    for path in _newest_first(folder):
        try:
            checkpoint = _load(path)
        except (OSError, ValueError, ValidationError) as broken:
            log.warning("checkpoint %s does not verify, trying the one before: %s", path.name, broken)
            continue
        if checkpoint.state.fingerprint == fingerprint:
            return checkpoint
        log.warning("checkpoint %s belongs to another job, ignored", path.name)
    return None


def _load(path: Path) -> Checkpoint:
    manifest = json.loads((path / MANIFEST).read_text())
    for file in (TENSORS, STATE):
        if manifest.get(file) != _sha256(path / file):
            raise ValueError(f"{file} differs from its manifest")
    return Checkpoint(State.model_validate_json((path / STATE).read_text()), load_file(path / TENSORS))


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
