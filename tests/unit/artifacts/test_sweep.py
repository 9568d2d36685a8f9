import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from artifacts.object_store import ObjectStore
from artifacts.store import ArtifactStore
from artifacts.sweep import sweep
from artifacts.version_store import VersionStore
from domain.errors import CorruptArtifact
from tests.unit.artifacts.conftest import stage


class Decisions:
    """A ledger that knows some versions and lets some of them go."""

    def __init__(self, known: set[str], letting_go: Sequence[str] = (), refused: Sequence[str] = ()) -> None:
        self.known, self.letting_go, self.refused = known, letting_go, refused

    def prunable(self) -> Sequence[str]:
        return [*self.letting_go, *self.refused]

    def prune(self, version_id: str) -> bool:
        if version_id in self.letting_go:
            self.known.discard(version_id)
            return True
        return False

    def unneeded(self, stored: Sequence[str]) -> Sequence[str]:
        return [version_id for version_id in stored if version_id not in self.known]


def fill(store: VersionStore, tmp_path: Path, ids: Sequence[str]) -> dict[str, str]:
    """Manifest hashes by id."""
    return {
        one: store.publish(
            stage(tmp_path / f"staging-{one}"), version_id=one, kind="adapter", base_model="b", update_id=one
        )[1]
        for one in ids
    }


def test_what_the_ledger_lets_go_is_deleted_and_the_rest_is_whole(
    version_store: VersionStore, tmp_path: Path
) -> None:
    hashes = fill(version_store, tmp_path, ["ver_1", "ver_2", "ver_3"])
    ledger = Decisions(set(hashes), letting_go=["ver_2"], refused=["ver_3"])
    done = sweep(version_store, ledger, grace_seconds=3600)
    assert done.pruned == ["ver_2"]
    for kept in ("ver_1", "ver_3"):
        version_store.verify(kept, hashes[kept])
    with pytest.raises(CorruptArtifact):
        version_store.verify("ver_2", hashes["ver_2"])


def test_orphans_go_after_the_grace_and_not_before(version_store: VersionStore, tmp_path: Path) -> None:
    hashes = fill(version_store, tmp_path, ["ver_1", "ver_lost"])
    ledger = Decisions({"ver_1"})
    assert sweep(version_store, ledger, grace_seconds=3600).orphans == []
    version_store.check("ver_lost", hashes["ver_lost"])
    assert sweep(version_store, ledger, grace_seconds=-5).orphans == ["ver_lost"]
    version_store.check("ver_1", hashes["ver_1"])
    assert [one.version_id for one in version_store.stored()] == ["ver_1"]


def test_an_upload_that_a_crash_cut_off_is_an_orphan(object_store: ObjectStore, s3, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    bucket, _, prefix = object_store.url.removeprefix("s3://").partition("/")
    s3.put_object(Bucket=bucket, Key=f"{prefix}/ver_half/{'a' * 64}", Body=b"half")
    assert sweep(object_store, Decisions(set()), grace_seconds=-5).orphans == ["ver_half"]
    assert list(object_store.stored()) == []


def test_a_deletion_that_a_crash_cut_off_is_finished_by_the_next_sweep(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    fill(store, tmp_path, ["ver_1"])
    (store.root / "ver_1").rename(store.root / ".leaving-ver_1-0a1b2c3d")
    young = store.new_folder("ver_2")
    old = store.new_folder("ver_3")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    done = sweep(store, Decisions(set()), grace_seconds=3600)
    assert sorted(done.temporary) == sorted([".leaving-ver_1-0a1b2c3d", old.name])
    assert [path.name for path in store.root.iterdir()] == [young.name]


def test_a_sweep_may_clear_what_is_being_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    fill(store, tmp_path, ["ver_1"])
    remove = shutil.rmtree

    def after_a_sweep(path: Path, ignore_errors: bool = False) -> None:
        remove(path, ignore_errors=True)
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", after_a_sweep)
    store.delete("ver_1")
    assert list(store.root.iterdir()) == []
