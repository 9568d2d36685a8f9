"""A real S3 server on a port of its own, and both kinds of store."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from artifacts.object_store import ObjectStore
from artifacts.store import ArtifactStore
from artifacts.version_store import VersionStore

BUCKET = "ratchet"
_numbers = count(1)


def safetensors(values: bytes) -> bytes:
    """One float32 tensor, written out by hand."""
    shape = [len(values) // 4]
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, len(values)]}}).encode()
    return len(header).to_bytes(8, "little") + header + values


def stage(folder: Path, weights: bytes = bytes(range(16))) -> Path:
    """The files of a small version."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 4}')
    (folder / "adapter_model.safetensors").write_bytes(safetensors(weights))
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of an S3 server with one bucket."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test"}.items():
            environment.setenv(f"AWS_{name}", value)
        environment.setenv("AWS_REGION", "us-east-1")
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        environment.setenv("AWS_ENDPOINT_URL", url)
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=BUCKET)
        yield url
        server.stop()


@pytest.fixture
def s3(s3_server: str) -> Any:
    """A client of another make, to look at and to damage what the store wrote."""
    return boto3.client("s3", region_name="us-east-1")


@pytest.fixture
def object_store(s3_server: str, tmp_path: Path) -> ObjectStore:
    """Below a prefix of its own."""
    return ObjectStore(f"s3://{BUCKET}/prefix-{next(_numbers)}", ArtifactStore(tmp_path / "cache"))


@pytest.fixture(params=["folders", "objects"])
def version_store(request: pytest.FixtureRequest, tmp_path: Path) -> VersionStore:
    if request.param == "folders":
        return ArtifactStore(tmp_path / "artifacts")
    made: ObjectStore = request.getfixturevalue("object_store")
    return made
