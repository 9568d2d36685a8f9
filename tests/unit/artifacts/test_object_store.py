"""What is an object store's own: the local cache, crashes between requests, an unreachable server."""

import hashlib
import json
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest

from artifacts import object_store as module
from artifacts.cache import VersionCache
from artifacts.object_store import ObjectStore
from domain.errors import ArtifactsUnavailable, CorruptArtifact, InvalidInput
from tests.conftest_s3 import BUCKET
from tests.unit.artifacts.conftest import safetensors, stage

WHO: dict[str, Any] = {"version_id": "ver_1", "kind": "adapter", "base_model": "tiny", "update_id": "upd_1"}


class Died(BaseException):
    """Stands for the process's end: nothing in the store may catch it."""


def keys(s3: Any, store: ObjectStore) -> list[str]:
    prefix = store.url.removeprefix(f"s3://{BUCKET}/") + "/"
    found = s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return [one["Key"].removeprefix(prefix) for one in found]


def test_objects_are_named_by_their_content(object_store: ObjectStore, s3: Any, tmp_path: Path) -> None:
    object_store.publish(stage(tmp_path / "staging"), **WHO)
    contents = [b'{"r": 4}', b"{}", safetensors(bytes(range(16)))]
    assert set(keys(s3, object_store)) == {
        "ver_1/manifest.json",
        *(f"ver_1/{hashlib.sha256(content).hexdigest()}" for content in contents),
    }


@pytest.mark.parametrize("survived", range(4))
def test_a_crash_between_any_two_uploads_shows_nothing_and_can_be_run_again(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    staging = stage(tmp_path / "staging")
    real, uploads = obstore.put, iter(range(survived))

    def put(*arguments: Any, **options: Any) -> Any:
        if next(uploads, None) is None:
            raise Died
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr("artifacts.object_store.obstore.put", put)
        with pytest.raises(Died):
            object_store.publish(staging, **WHO)
    assert staging.is_dir()
    assert [one.whole for one in object_store.stored()] == ([False] if survived else [])
    with pytest.raises(CorruptArtifact) as caught:
        object_store.verify("ver_1", "0" * 64)
    assert caught.value.code == "missing_artifact"
    _, manifest_sha256 = object_store.publish(staging, **WHO)
    object_store.verify("ver_1", manifest_sha256)


def test_what_did_not_arrive_whole_never_becomes_visible(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = obstore.put

    def cut_off(bucket: Any, key: str, content: Any, **options: Any) -> Any:
        return real(
            bucket, key, content.read_bytes()[:-1] if isinstance(content, Path) else content, **options
        )

    monkeypatch.setattr("artifacts.object_store.obstore.put", cut_off)
    with pytest.raises(CorruptArtifact):
        object_store.publish(stage(tmp_path / "staging"), **WHO)
    assert [one.whole for one in object_store.stored()] == [False]


def test_a_file_of_several_parts(object_store: ObjectStore, tmp_path: Path) -> None:
    weights = bytes(range(256)) * (48 * 1024)  # 12 MiB, more than two parts of 5 MiB
    _, manifest_sha256 = object_store.publish(stage(tmp_path / "staging", weights), **WHO)
    folder = object_store.verify("ver_1", manifest_sha256)
    assert (folder / "adapter_model.safetensors").read_bytes() == safetensors(weights)


def test_a_verified_copy_needs_no_store(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, manifest_sha256 = object_store.publish(stage(tmp_path / "staging"), **WHO)
    folder = object_store.verify("ver_1", manifest_sha256)
    monkeypatch.setattr("artifacts.object_store.obstore.get", pytest.fail)
    assert object_store.verify("ver_1", manifest_sha256) == folder


def test_a_damaged_copy_is_fetched_again(object_store: ObjectStore, tmp_path: Path) -> None:
    _, manifest_sha256 = object_store.publish(stage(tmp_path / "staging"), **WHO)
    folder = object_store.verify("ver_1", manifest_sha256)
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    assert object_store.verify("ver_1", manifest_sha256) == folder
    assert (folder / "adapter_model.safetensors").read_bytes() == safetensors(bytes(range(16)))
    assert sorted(path.name for path in folder.parent.iterdir()) == [".in-use-ver_1", "ver_1"]


def test_a_fetch_that_fails_leaves_no_copy(object_store: ObjectStore, s3: Any, tmp_path: Path) -> None:
    manifest, manifest_sha256 = object_store.publish(stage(tmp_path / "staging"), **WHO)
    prefix = object_store.url.removeprefix(f"s3://{BUCKET}/")
    s3.delete_object(Bucket=BUCKET, Key=f"{prefix}/ver_1/{manifest.files[1].sha256}")
    with pytest.raises(CorruptArtifact, match=r"adapter_model\.safetensors is missing"):
        object_store.verify("ver_1", manifest_sha256)
    assert [path.name for path in object_store.cache.root.iterdir()] == [".in-use-ver_1"]


def test_a_manifest_that_leads_out_of_its_folder_is_refused(
    object_store: ObjectStore, s3: Any, tmp_path: Path
) -> None:
    manifest, _ = object_store.publish(stage(tmp_path / "staging"), **WHO)
    hostile = json.loads(manifest.model_dump_json())
    hostile["files"][0]["path"] = "../../outside.json"
    content = json.dumps(hostile).encode()
    prefix = object_store.url.removeprefix(f"s3://{BUCKET}/")
    s3.put_object(Bucket=BUCKET, Key=f"{prefix}/ver_1/manifest.json", Body=content)
    with pytest.raises(CorruptArtifact, match="leads out"):
        object_store.verify("ver_1", hashlib.sha256(content).hexdigest())
    assert not (tmp_path / "outside.json").exists()


@pytest.fixture
def nobody() -> Iterator[str]:
    """Url at which nobody listens, and nobody else can begin to meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_store_that_does_not_answer_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nobody: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", nobody)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setattr(module, "PATIENCE", timedelta(seconds=1))
    store = ObjectStore(f"s3://{BUCKET}/nowhere", VersionCache(tmp_path / "cache", 1_000_000))
    staging = stage(tmp_path / "staging")
    for attempt in (
        lambda: store.publish(staging, **WHO),
        lambda: store.verify("ver_1", "0" * 64),
        lambda: store.check("ver_1", "0" * 64),
        lambda: list(store.stored()),
        lambda: store.delete("ver_1"),
    ):
        with pytest.raises(ArtifactsUnavailable, match=f"s3://{BUCKET}/nowhere does not answer"):
            attempt()
    assert staging.is_dir()


def test_a_url_without_a_bucket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        ObjectStore("ftp://bucket", VersionCache(tmp_path, 1_000_000))
    assert caught.value.param == "RATCHET_ARTIFACTS_URL"
