import hashlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from artifacts.store import ArtifactStore
from domain.errors import Conflict, CorruptArtifact
from domain.version import Manifest

WHO = {"version_id": "ver_1", "kind": "adapter", "base_model": "tiny", "update_id": "upd_1"}


def safetensors(values: bytes) -> bytes:
    """One float32 tensor, written out by hand."""
    shape = [len(values) // 4]
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, len(values)]}}).encode()
    return len(header).to_bytes(8, "little") + header + values


WEIGHTS = safetensors(b"\x00\x00\x80\x3f" * 64)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    return stage(tmp_path / "staging")


def stage(folder: Path) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 4}')
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


def test_a_version_appears_whole_with_its_manifest(store: ArtifactStore, staging: Path) -> None:
    manifest, manifest_sha256 = store.publish(staging, **WHO)
    folder = store.path("ver_1")
    assert not staging.exists()
    assert [(file.path, file.size, file.sha256) for file in manifest.files] == [
        ("adapter_config.json", 8, hashlib.sha256(b'{"r": 4}').hexdigest()),
        ("adapter_model.safetensors", len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest()),
        ("tokenizer/tokenizer.json", 2, hashlib.sha256(b"{}").hexdigest()),
    ]
    assert (manifest.kind, manifest.base_model, manifest.update_id) == ("adapter", "tiny", "upd_1")
    written = (folder / "manifest.json").read_bytes()
    assert Manifest.model_validate_json(written) == manifest
    assert manifest_sha256 == hashlib.sha256(written).hexdigest()
    assert store.verify("ver_1", manifest_sha256) == folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "tokenizer",
    ]


def flip(folder: Path) -> str:
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path.name


def truncate(folder: Path) -> str:
    os.truncate(folder / "adapter_model.safetensors", len(WEIGHTS) - 4)
    return "adapter_model.safetensors"


def remove(folder: Path) -> str:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    return "tokenizer/tokenizer.json"


def add(folder: Path) -> str:
    (folder / "tokenizer" / "extra.json").write_text("{}")
    return "tokenizer/extra.json"


def add_pickle(folder: Path) -> str:
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(1))
    return "adapter_model.bin"


def link(folder: Path) -> str:
    path = folder / "adapter_config.json"
    content = path.read_text()
    path.unlink()
    (folder.parent / "elsewhere.json").write_text(content)
    path.symlink_to(folder.parent / "elsewhere.json")
    return path.name


def link_folder(folder: Path) -> str:
    (folder / "tokenizer").rename(folder.parent / "tokenizer")
    (folder / "tokenizer").symlink_to(folder.parent / "tokenizer")
    return "tokenizer"


def drop_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json"


def rewrite_manifest(folder: Path) -> str:
    """A changed file with a manifest that agrees with it."""
    flip(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "adapter_model.safetensors").read_bytes()
    manifest["files"][1]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "manifest.json"


@pytest.mark.parametrize(
    "damage", [flip, truncate, remove, add, add_pickle, link, link_folder, drop_manifest, rewrite_manifest]
)
def test_damage_is_found_and_named(store: ArtifactStore, staging: Path, damage) -> None:  # type: ignore[no-untyped-def]
    _, manifest_sha256 = store.publish(staging, **WHO)
    name = damage(store.path("ver_1"))
    with pytest.raises(CorruptArtifact) as caught:
        store.verify("ver_1", manifest_sha256)
    assert caught.value.param == name
    assert name in caught.value.message


def test_a_version_that_is_not_there_does_not_verify(store: ArtifactStore) -> None:
    with pytest.raises(CorruptArtifact):
        store.verify("ver_none", "0" * 64)


@pytest.mark.parametrize("version_id", ["", ".", "..", "../up", "a/b", "/etc", "ver 1", "ver\x00"])
def test_ids_that_leave_the_root_are_refused(store: ArtifactStore, staging: Path, version_id: str) -> None:
    with pytest.raises(CorruptArtifact):
        store.publish(staging, **{**WHO, "version_id": version_id})
    with pytest.raises(CorruptArtifact):
        store.verify(version_id, "0" * 64)
    assert staging.exists()


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "model.pt", "state.pkl", "run.py", "lib.so", "weights", "sub/x.ckpt"]
)
def test_only_safetensors_and_text_are_published(store: ArtifactStore, staging: Path, name: str) -> None:
    (staging / name).parent.mkdir(exist_ok=True)
    (staging / name).write_bytes(b"x")
    with pytest.raises(CorruptArtifact) as caught:
        store.publish(staging, **WHO)
    assert caught.value.param == name
    assert not store.path("ver_1").exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"weights": [1.0] * 50}),
        b"",
        b"\x02",
        WEIGHTS[:-4],
        WEIGHTS + b"tail",
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"w": {}}',
        (1 << 62).to_bytes(8, "little") + b"{}",
    ],
    ids=["pickle", "empty", "one byte", "cut off", "tail", "no object", "no offsets", "huge header"],
)
def test_what_is_called_safetensors_must_be_it(store: ArtifactStore, staging: Path, content: bytes) -> None:
    (staging / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(CorruptArtifact) as caught:
        store.publish(staging, **WHO)
    assert caught.value.param == "adapter_model.safetensors"


def test_weights_are_needed(store: ArtifactStore, staging: Path) -> None:
    (staging / "adapter_model.safetensors").unlink()
    with pytest.raises(CorruptArtifact, match="no weights"):
        store.publish(staging, **WHO)


@pytest.mark.parametrize("target", ["adapter_config.json", "."])
def test_links_are_not_published(store: ArtifactStore, staging: Path, target: str) -> None:
    (staging / "link.json").symlink_to(staging / target)
    with pytest.raises(CorruptArtifact) as caught:
        store.publish(staging, **WHO)
    assert caught.value.param == "link.json"


def test_pipes_are_not_published(store: ArtifactStore, staging: Path) -> None:
    os.mkfifo(staging / "pipe.json")
    with pytest.raises(CorruptArtifact):
        store.publish(staging, **WHO)


def test_nothing_staged_is_an_error(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact):
        store.publish(tmp_path / "none", **WHO)


class Died(BaseException):
    """Stands for the process's end: nothing in the store may catch it."""


def die(*args: object, **kwargs: object) -> None:
    raise Died


CRASHES = {
    "hashing": ("artifacts.files.sha256_of", False),
    "before the manifest": ("artifacts.store.write_manifest", False),
    "manifest half written": ("pathlib.Path.replace", False),
    "before the rename": ("pathlib.Path.rename", False),
    "after the rename": ("artifacts.store.fsync", True),
}


@pytest.mark.parametrize("moment", CRASHES)
def test_a_crash_at_any_moment_shows_nothing_half_and_can_be_run_again(
    store: ArtifactStore, staging: Path, monkeypatch: pytest.MonkeyPatch, moment: str, tmp_path: Path
) -> None:
    reference, reference_sha256 = ArtifactStore(tmp_path / "other").publish(stage(tmp_path / "copy"), **WHO)
    where, moved = CRASHES[moment]
    with monkeypatch.context() as patched:
        if moved:
            patched.setattr("artifacts.store.fsync", fail_on(store.root))
        else:
            patched.setattr(where, die)
        with pytest.raises(Died):
            store.publish(staging, **WHO)
    assert store.path("ver_1").exists() == moved
    assert staging.exists() == (not moved)
    manifest, manifest_sha256 = store.publish(staging, **WHO)
    assert (manifest, manifest_sha256) == (reference, reference_sha256)
    store.verify("ver_1", manifest_sha256)
    # And once more, as after a crash before the row was written.
    assert store.publish(staging, **WHO) == (reference, reference_sha256)


def fail_on(root: Path):  # type: ignore[no-untyped-def]
    from artifacts.files import fsync as real_fsync

    def fsync(folder: Path) -> None:
        if folder == root:
            raise Died
        real_fsync(folder)

    return fsync


def test_an_identical_staging_is_the_published_version(
    store: ArtifactStore, staging: Path, tmp_path: Path
) -> None:
    first = store.publish(staging, **WHO)
    assert store.publish(stage(tmp_path / "again"), **WHO) == first


def test_other_files_under_the_same_id_are_refused(
    store: ArtifactStore, staging: Path, tmp_path: Path
) -> None:
    _, manifest_sha256 = store.publish(staging, **WHO)
    other = stage(tmp_path / "other")
    (other / "adapter_config.json").write_text('{"r": 8}')
    for source, who in ((other, WHO), (staging, {**WHO, "update_id": "upd_2"})):
        with pytest.raises(Conflict) as caught:
            store.publish(source, **who)
        assert caught.value.code == "artifact_exists"
    store.verify("ver_1", manifest_sha256)


def test_a_damaged_version_is_not_published_again_as_whole(store: ArtifactStore, staging: Path) -> None:
    store.publish(staging, **WHO)
    flip(store.path("ver_1"))
    with pytest.raises(CorruptArtifact):
        store.publish(staging, **WHO)


def test_many_publish_the_same_version_at_once(store: ArtifactStore, tmp_path: Path) -> None:
    folders = [stage(tmp_path / f"staging-{n}") for n in range(6)]
    barrier = Barrier(6)

    def publish(folder: Path) -> tuple[Manifest, str]:
        barrier.wait(30)
        return store.publish(folder, **WHO)

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(publish, folders))
    assert all(result == results[0] for result in results)
    store.verify("ver_1", results[0][1])


def test_a_link_in_place_of_the_version_is_refused(
    store: ArtifactStore, staging: Path, tmp_path: Path
) -> None:
    _, manifest_sha256 = store.publish(staging, **WHO)
    store.path("ver_1").rename(tmp_path / "moved")
    store.path("ver_1").symlink_to(tmp_path / "moved")
    with pytest.raises(CorruptArtifact):
        store.verify("ver_1", manifest_sha256)
    with pytest.raises(CorruptArtifact):
        store.publish(stage(tmp_path / "new"), **WHO)
