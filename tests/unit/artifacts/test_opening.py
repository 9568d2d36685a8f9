"""Which store the settings name, and folders on another file system than the work folder."""

import errno
from pathlib import Path

import pytest

from artifacts.object_store import ObjectStore
from artifacts.opening import open_store
from artifacts.store import ArtifactStore
from domain.errors import CorruptArtifact, InvalidInput
from domain.settings import Settings
from tests.conftest_s3 import BUCKET
from tests.unit.artifacts.conftest import stage


def test_the_default_is_folders_in_the_home(tmp_path: Path) -> None:
    store = open_store(Settings(home=tmp_path))
    assert isinstance(store, ArtifactStore)
    assert store.root == tmp_path / "artifacts"


def test_a_file_url_names_folders_elsewhere(tmp_path: Path) -> None:
    store = open_store(Settings(home=tmp_path, artifacts_url="file:///mnt/with%20space"))
    assert isinstance(store, ArtifactStore)
    assert store.root == Path("/mnt/with space")


def test_an_s3_url_names_a_bucket_with_copies_in_the_home(tmp_path: Path, s3_server: str) -> None:
    store = open_store(Settings(home=tmp_path, artifacts_url=f"s3://{BUCKET}/some"))
    assert isinstance(store, ObjectStore)
    assert store.cache.root == tmp_path / "artifacts-cache"


@pytest.mark.parametrize("url", ["", "bucket", "ftp://host/x", "s3://", "file://host/x", "file:relative"])
def test_other_urls_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        open_store(Settings(home=tmp_path, artifacts_url=url))
    assert caught.value.param == "RATCHET_ARTIFACTS_URL"


def across_file_systems(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Renames into `root` from anywhere else fail as they do between file systems."""
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if Path(target).parent == root and self.parent != root:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)


def test_a_version_from_another_file_system_arrives_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    across_file_systems(monkeypatch, store.root)
    staging = stage(tmp_path / "staging")
    _, manifest_sha256 = store.publish(
        staging, version_id="ver_1", kind="adapter", base_model="b", update_id="u"
    )
    store.verify("ver_1", manifest_sha256)
    assert not staging.exists()
    assert [path.name for path in store.root.iterdir()] == ["ver_1"]


def test_a_copy_between_file_systems_that_is_cut_off_is_never_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    staging = stage(tmp_path / "staging")

    def cut_off(source: Path, target: Path) -> None:
        (target / "manifest.json").write_bytes((source / "manifest.json").read_bytes())

    with monkeypatch.context() as patched:
        across_file_systems(patched, store.root)
        patched.setattr("artifacts.store.copy_durably", cut_off)
        with pytest.raises(CorruptArtifact):
            store.publish(staging, version_id="ver_1", kind="adapter", base_model="b", update_id="u")
    assert list(store.stored()) == []
    assert staging.is_dir()
    store.publish(staging, version_id="ver_1", kind="adapter", base_model="b", update_id="u")
