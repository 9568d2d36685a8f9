"""Both kinds of store, and the files of a small version."""

import json
from pathlib import Path

import pytest

from artifacts.cache import VersionCache
from artifacts.object_store import ObjectStore
from artifacts.store import ArtifactStore
from artifacts.version_store import VersionStore
from tests.conftest_s3 import Prefix


def safetensors(values: bytes, name: str = "w") -> bytes:
    """One float32 tensor, written out by hand."""
    shape = [len(values) // 4]
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, len(values)]}}).encode()
    return len(header).to_bytes(8, "little") + header + values


def stage(folder: Path, weights: bytes = bytes(range(16))) -> Path:
    """The files of a small version."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 4}')
    (folder / "adapter_model.safetensors").write_bytes(safetensors(weights))
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def object_store(s3_prefix: Prefix, tmp_path: Path) -> ObjectStore:
    """Below a prefix of its own."""
    return ObjectStore(s3_prefix.url, VersionCache(tmp_path / "cache", 1_000_000_000))


@pytest.fixture(params=["folders", "objects"])
def version_store(request: pytest.FixtureRequest, tmp_path: Path) -> VersionStore:
    if request.param == "folders":
        return ArtifactStore(tmp_path / "artifacts")
    made: ObjectStore = request.getfixturevalue("object_store")
    return made
