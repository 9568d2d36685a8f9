"""A checkpoint is seen whole or not at all; a broken one gives way to the one before."""

from pathlib import Path

import pytest
import torch

from trainer.checkpoints import Checkpoint, PendingSample, State, load_newest, save


def checkpoint(step: int, fingerprint: str = "job") -> Checkpoint:
    pending = {step: [PendingSample(tokens=[1, 2], truncated=False, logprobs=[-0.5, -1.25])]}
    state = State(step=step, fingerprint=fingerprint, pending=pending, seconds=1.5)
    return Checkpoint(state, {"w": torch.full((3,), float(step))})


def test_round_trip_of_the_newest(tmp_path: Path) -> None:
    save(tmp_path, checkpoint(2))
    save(tmp_path, checkpoint(10))
    found = load_newest(tmp_path, "job")
    assert found is not None
    assert found.state == checkpoint(10).state
    assert found.tensors["w"].tolist() == [10.0, 10.0, 10.0]


def test_nothing_there(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "absent", "job") is None


def test_two_are_kept_and_no_staging_remains(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, checkpoint(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000006"]


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, checkpoint(2))
    newest = save(tmp_path, checkpoint(4)) / file
    content = newest.read_bytes()
    if damage == "remove":
        newest.unlink()
    else:
        newest.write_bytes(
            content[: len(content) // 2] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1])
        )
    found = load_newest(tmp_path, "job")
    assert found is not None
    assert found.state.step == 2


def test_a_half_written_staging_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, checkpoint(2))
    (tmp_path / ".staging-step-000004").mkdir()
    found = load_newest(tmp_path, "job")
    assert found is not None
    assert found.state.step == 2
    save(tmp_path, checkpoint(4))
    assert not (tmp_path / ".staging-step-000004").exists()


def test_another_jobs_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    save(tmp_path, checkpoint(2, fingerprint="another"))
    assert load_newest(tmp_path, "job") is None


def test_what_was_just_written_stays_beside_another_jobs_later_ones(tmp_path: Path) -> None:
    for step in (70, 80):
        save(tmp_path, checkpoint(step, "another"))
    for step in (10, 20):
        save(tmp_path, checkpoint(step))
    found = load_newest(tmp_path, "job")
    assert found is not None
    assert found.state.step == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000020"]
