"""The bound on local copies: who goes, who stays, and that nobody who reads ever misses a file."""

import fcntl
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from artifacts.cache import VersionCache
from artifacts.object_store import ObjectStore
from artifacts.store import ArtifactStore
from tests.unit.artifacts.conftest import safetensors, stage

clock = count(1_000_000_000)
CONTENT = 4096
"""Bytes of each version's weights, which differ; the rest of it is a few hundred."""
ONE = 6000
"""A bound that one version fits and two do not."""


@pytest.fixture
def versions(object_store: ObjectStore, tmp_path: Path) -> dict[str, str]:
    """Manifest hashes of ver_1 to ver_4."""
    return {
        f"ver_{number}": object_store.publish(
            stage(tmp_path / f"staging-{number}", bytes([number]) * CONTENT),
            version_id=f"ver_{number}",
            kind="adapter",
            base_model="tiny",
            update_id="upd_1",
        )[1]
        for number in range(1, 5)
    }


def bounded(store: ObjectStore, max_bytes: int) -> ObjectStore:
    return ObjectStore(store.url, VersionCache(store.cache.root, max_bytes))


def fetched(store: ObjectStore) -> list[str]:
    return [one.version_id for one in store.cache.stored()]


def read(store: ObjectStore, versions: dict[str, str], *numbers: int) -> None:
    for number in numbers:
        version_id = f"ver_{number}"
        store.verify(version_id, versions[version_id])
        # Times in order, however coarse the file system's are.
        for path in store.cache.root.glob(f".in-use-{version_id}"):
            used_at = next(clock)
            os.utime(path, (used_at, used_at))


@contextmanager
def another_process(store: ObjectStore, version_id: str, *then: str) -> Iterator[subprocess.Popen[bytes]]:
    """Uses the version's copy until it is killed, after it became the program `then`, if any."""
    source = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from artifacts.cache import VersionCache\n"
        "use = VersionCache(Path(sys.argv[1]), 1).held(sys.argv[2])\n"
        "use.__enter__()\n"
        "print('held', flush=True)\n"
        "os.execvp(sys.argv[3], sys.argv[3:]) if sys.argv[3:] else sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", source, str(store.cache.root), version_id, *then]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_least_recently_used_make_room(object_store: ObjectStore, versions: dict[str, str]) -> None:
    store = bounded(object_store, 2 * ONE)
    read(store, versions, 1, 2)
    assert fetched(store) == ["ver_1", "ver_2"]
    read(store, versions, 1, 3)
    assert fetched(store) == ["ver_1", "ver_3"]
    read(store, versions, 4)
    assert fetched(store) == ["ver_3", "ver_4"]
    assert sorted(path.name for path in store.cache.root.glob(".*")) == [".in-use-ver_3", ".in-use-ver_4"]


def test_what_is_larger_than_the_bound_comes_all_the_same(
    object_store: ObjectStore, versions: dict[str, str]
) -> None:
    store = bounded(object_store, 100)
    read(store, versions, 1)
    assert fetched(store) == ["ver_1"]
    read(store, versions, 2)
    assert fetched(store) == ["ver_2"]


def test_what_is_in_use_stays_and_counts_as_used(
    object_store: ObjectStore, versions: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    store = bounded(object_store, 2 * ONE)
    read(store, versions, 1)
    with store.held("ver_1"):
        read(store, versions, 2, 3, 4)
        assert fetched(store) == ["ver_1", "ver_4"]
        assert "RATCHET_ARTIFACTS_CACHE_BYTES" not in caplog.text
        with store.held("ver_4"):
            read(store, versions, 3)
            assert fetched(store) == ["ver_1", "ver_3", "ver_4"]
            assert "RATCHET_ARTIFACTS_CACHE_BYTES allows 12000" in caplog.text
    store.remove_temporary(3600)  # as the hourly sweep does
    assert len(fetched(store)) == 2


def test_the_sweep_brings_a_cache_within_a_lowered_bound(
    object_store: ObjectStore, versions: dict[str, str]
) -> None:
    read(object_store, versions, 3, 1, 2)
    bounded(object_store, 2 * ONE).remove_temporary(3600)
    assert fetched(object_store) == ["ver_1", "ver_2"]


@pytest.mark.parametrize("then", [[], ["sleep", "60"]], ids=["holds", "holds through exec"])
def test_another_process_keeps_what_it_uses_until_it_is_killed(
    object_store: ObjectStore, versions: dict[str, str], then: list[str]
) -> None:
    store = bounded(object_store, ONE)
    read(store, versions, 1)
    with another_process(store, "ver_1", *then) as process:
        if then:
            while Path(f"/proc/{process.pid}/comm").read_text().strip() != then[0]:
                assert process.poll() is None
        read(store, versions, 2, 3)
        assert fetched(store) == ["ver_1", "ver_3"]
    read(store, versions, 4)
    assert fetched(store) == ["ver_4"]


def test_a_copy_that_never_came_leaves_no_lock_file_for_long(
    object_store: ObjectStore, versions: dict[str, str]
) -> None:
    with object_store.held("ver_9"):
        object_store.cache.make_room(0)
        assert (object_store.cache.root / ".in-use-ver_9").exists()
    read(object_store, versions, 1)
    assert [path.name for path in object_store.cache.root.glob(".*")] == [".in-use-ver_1"]


def test_a_copy_that_goes_while_they_are_listed_is_left_out(
    object_store: ObjectStore, versions: dict[str, str]
) -> None:
    read(object_store, versions, 1, 2)
    listed = object_store.cache.stored()
    assert next(listed).version_id == "ver_1"
    object_store.cache.delete("ver_2")
    assert list(listed) == []


def test_two_that_make_room_at_once_do_not_meet(
    object_store: ObjectStore, versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one, at work on a copy when this one comes to it, is done before this one has noted that."""
    store = bounded(object_store, ONE)
    read(store, versions, 1)
    cache, lock_file = store.cache, store.cache.root / ".in-use-ver_1"
    other = os.open(lock_file, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    open_lock = cache._lock

    def lock(version_id: str, how: int) -> int | None:
        found = open_lock(version_id, how)
        cache.delete(version_id)
        lock_file.unlink()
        os.close(other)
        return found

    monkeypatch.setattr(cache, "_lock", lock)
    cache.make_room(ONE)
    assert fetched(store) == []


def test_folders_that_are_the_versions_themselves_never_go(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    with store.held("ver_1"):
        pass
    assert not store.root.exists()


def test_many_readers_of_more_than_fits_never_miss_a_file(
    object_store: ObjectStore, versions: dict[str, str]
) -> None:
    """Each thread has a store of its own, as processes have."""
    copies: set[tuple[str, int]] = set()

    def use(seed: int) -> None:
        store = bounded(object_store, ONE)
        for number in random.Random(seed).choices(range(1, 5), k=16):
            version_id = f"ver_{number}"
            with store.held(version_id):
                folder = store.verify(version_id, versions[version_id])
                expected = safetensors(bytes([number]) * CONTENT)
                assert (folder / "adapter_model.safetensors").read_bytes() == expected
                copies.add((version_id, (folder / "manifest.json").stat().st_mtime_ns))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(use, range(3)))
    assert len(copies) > len(versions)  # some went, and came again
    read(bounded(object_store, ONE), versions, 1)
    assert len(fetched(object_store)) <= 2
