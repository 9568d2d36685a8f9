"""What holds for folders and for an object store alike."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from artifacts.object_store import ObjectStore
from artifacts.store import ArtifactStore
from artifacts.version_store import VersionStore
from domain.errors import Conflict, CorruptArtifact
from domain.version import Manifest
from tests.conftest_s3 import BUCKET
from tests.unit.artifacts.conftest import safetensors, stage

WHO: dict[str, Any] = {"version_id": "ver_1", "kind": "adapter", "base_model": "tiny", "update_id": "upd_1"}
ABSENT = "0" * 64


class Damage:
    """Reads and replaces the bytes that a store keeps, behind its back."""

    def __init__(self, store: VersionStore, s3: Any) -> None:
        self.store, self.s3 = store, s3

    def stored(self, manifest: Manifest) -> dict[str, bytes]:
        """Content by what it is called where it is kept."""
        if isinstance(self.store, ArtifactStore):
            names = [*(file.path for file in manifest.files), "manifest.json"]
            return {name: (self.store.path("ver_1") / name).read_bytes() for name in names}
        names = [*(file.sha256 for file in manifest.files), "manifest.json"]
        return {name: self.s3.get_object(Bucket=BUCKET, Key=self.key(name))["Body"].read() for name in names}

    def put(self, name: str, content: bytes) -> None:
        if isinstance(self.store, ArtifactStore):
            (self.store.path("ver_1") / name).write_bytes(content)
        else:
            self.s3.put_object(Bucket=BUCKET, Key=self.key(name), Body=content)

    def remove(self, name: str) -> None:
        if isinstance(self.store, ArtifactStore):
            (self.store.path("ver_1") / name).unlink()
        else:
            self.s3.delete_object(Bucket=BUCKET, Key=self.key(name))

    def key(self, name: str) -> str:
        assert isinstance(self.store, ObjectStore)
        return f"{self.store.url.removeprefix(f's3://{BUCKET}/')}/ver_1/{name}"


@pytest.fixture
def s3_client(request: pytest.FixtureRequest, version_store: VersionStore) -> Any:
    return request.getfixturevalue("s3") if isinstance(version_store, ObjectStore) else None


def test_what_was_published_comes_back(version_store: VersionStore, tmp_path: Path) -> None:
    manifest, manifest_sha256 = version_store.publish(stage(tmp_path / "staging"), **WHO)
    folder = version_store.verify("ver_1", manifest_sha256)
    assert (folder / "adapter_model.safetensors").read_bytes() == safetensors(bytes(range(16)))
    assert (folder / "tokenizer" / "tokenizer.json").read_text() == "{}"
    assert sorted(file.path for file in manifest.files) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer/tokenizer.json",
    ]
    assert not (tmp_path / "staging").exists()
    version_store.check("ver_1", manifest_sha256)
    assert [(one.version_id, one.whole) for one in version_store.stored()] == [("ver_1", True)]


def test_both_stores_give_a_version_the_same_manifest(object_store: ObjectStore, tmp_path: Path) -> None:
    folders = ArtifactStore(tmp_path / "artifacts")
    assert folders.publish(stage(tmp_path / "one"), **WHO) == object_store.publish(
        stage(tmp_path / "two"), **WHO
    )


def test_every_flipped_byte_is_found(version_store: VersionStore, s3_client: Any, tmp_path: Path) -> None:
    manifest, manifest_sha256 = version_store.publish(stage(tmp_path / "staging"), **WHO)
    damage = Damage(version_store, s3_client)
    flips = 0
    for name, content in damage.stored(manifest).items():
        # An object costs two requests for each of its bytes: there, every bit of every seventh one.
        for at in range(0, len(content), 7 if s3_client else 1):
            for bit in (0, 7) if s3_client else range(8):
                flipped = bytearray(content)
                flipped[at] ^= 1 << bit
                damage.put(name, bytes(flipped))
                with pytest.raises(CorruptArtifact):
                    version_store.verify("ver_1", manifest_sha256)
                flips += 1
        damage.put(name, content)
    version_store.verify("ver_1", manifest_sha256)
    assert flips > (100 if s3_client else 4000)


def test_truncation_of_every_file_is_found(
    version_store: VersionStore, s3_client: Any, tmp_path: Path
) -> None:
    manifest, manifest_sha256 = version_store.publish(stage(tmp_path / "staging"), **WHO)
    damage = Damage(version_store, s3_client)
    for name, content in damage.stored(manifest).items():
        for kept in {0, 1, len(content) // 2, len(content) - 1}:
            damage.put(name, content[:kept])
            with pytest.raises(CorruptArtifact):
                version_store.check("ver_1", manifest_sha256)
            with pytest.raises(CorruptArtifact):
                version_store.verify("ver_1", manifest_sha256)
        damage.remove(name)
        with pytest.raises(CorruptArtifact):
            version_store.verify("ver_1", manifest_sha256)
        damage.put(name, content)
    version_store.verify("ver_1", manifest_sha256)


def test_files_that_are_gone_are_told_from_damaged_ones(version_store: VersionStore) -> None:
    for look in (version_store.verify, version_store.check):
        with pytest.raises(CorruptArtifact) as caught:
            look("ver_1", ABSENT)
        assert caught.value.code == "missing_artifact"


def test_another_versions_manifest_is_refused(version_store: VersionStore, tmp_path: Path) -> None:
    version_store.publish(stage(tmp_path / "staging"), **WHO)
    with pytest.raises(CorruptArtifact) as caught:
        version_store.verify("ver_1", ABSENT)
    assert caught.value.param == "manifest.json"


def test_publishing_again_is_the_same_version(version_store: VersionStore, tmp_path: Path) -> None:
    first = version_store.publish(stage(tmp_path / "one"), **WHO)
    assert version_store.publish(stage(tmp_path / "two"), **WHO) == first
    assert version_store.publish(tmp_path / "gone", **WHO) == first


def test_other_content_under_the_same_id_is_refused(version_store: VersionStore, tmp_path: Path) -> None:
    _, manifest_sha256 = version_store.publish(stage(tmp_path / "one"), **WHO)
    with pytest.raises(Conflict) as caught:
        version_store.publish(stage(tmp_path / "two", bytes(16)), **WHO)
    assert caught.value.code == "artifact_exists"
    version_store.verify("ver_1", manifest_sha256)


def test_one_of_several_different_publications_wins_whole(
    version_store: VersionStore, tmp_path: Path
) -> None:
    contents = [bytes([n]) * 16 for n in range(4)]
    barrier = Barrier(4)

    def publish(number: int) -> str | None:
        staging = stage(tmp_path / f"staging-{number}", contents[number])
        barrier.wait(30)
        try:
            return version_store.publish(staging, **WHO)[1]
        except Conflict:
            return None

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(publish, range(4)))
    [winner] = [number for number, found in enumerate(results) if found is not None]
    manifest_sha256 = results[winner]
    assert manifest_sha256 is not None
    folder = version_store.verify("ver_1", manifest_sha256)
    assert (folder / "adapter_model.safetensors").read_bytes() == safetensors(contents[winner])


def test_pickles_are_refused(version_store: VersionStore, tmp_path: Path) -> None:
    staging = stage(tmp_path / "staging")
    (staging / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CorruptArtifact) as caught:
        version_store.publish(staging, **WHO)
    assert caught.value.param == "adapter_model.bin"
    assert list(version_store.stored()) == []


def test_a_deleted_version_is_gone_and_may_be_deleted_again(
    version_store: VersionStore, tmp_path: Path
) -> None:
    _, manifest_sha256 = version_store.publish(stage(tmp_path / "staging"), **WHO)
    version_store.verify("ver_1", manifest_sha256)
    version_store.publish(stage(tmp_path / "other"), **{**WHO, "version_id": "ver_10"})
    version_store.delete("ver_1")
    version_store.delete("ver_1")
    with pytest.raises(CorruptArtifact) as caught:
        version_store.verify("ver_1", manifest_sha256)
    assert caught.value.code == "missing_artifact"
    assert [one.version_id for one in version_store.stored()] == ["ver_10"]


def test_a_version_moves_between_stores_under_its_manifest(
    version_store: VersionStore, tmp_path: Path
) -> None:
    origin = ArtifactStore(tmp_path / "origin")
    _, manifest_sha256 = origin.publish(stage(tmp_path / "staging"), **WHO)
    copy = tmp_path / "copy"
    origin.verify("ver_1", manifest_sha256).rename(copy)
    with pytest.raises(CorruptArtifact):
        version_store.add(copy, "ver_1", ABSENT)
    version_store.add(copy, "ver_1", manifest_sha256)
    version_store.add(copy, "ver_1", manifest_sha256)
    assert version_store.verify("ver_1", manifest_sha256).name == "ver_1"


@pytest.mark.parametrize("version_id", ["", ".", "..", "../up", "a/b", "/etc", "ver 1", "ver\x00"])
def test_ids_that_lead_elsewhere_are_refused(
    version_store: VersionStore, tmp_path: Path, version_id: str
) -> None:
    staging = stage(tmp_path / "staging")
    for attempt in (
        lambda: version_store.publish(staging, **{**WHO, "version_id": version_id}),
        lambda: version_store.verify(version_id, ABSENT),
        lambda: version_store.delete(version_id),
    ):
        with pytest.raises(CorruptArtifact):
            attempt()
    assert staging.is_dir()
