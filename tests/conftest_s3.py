"""A real S3 server on a port of its own; see tests/worker_stack/s3_gate.py for one that fails on demand."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest

BUCKET = "ratchet"
_numbers = count(1)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of an S3 server with one bucket."""
    # A second's worth of imports, for the tests that need them.
    import boto3
    from moto.server import ThreadedMotoServer

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
    import boto3

    return boto3.client("s3", region_name="us-east-1")


@dataclass(frozen=True)
class Prefix:
    """A part of the bucket that is one test's own, seen by a client of another make."""

    client: Any
    name: str

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/{self.name}"

    def keys(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self.name}/").get("Contents", [])
        return [one["Key"].removeprefix(f"{self.name}/") for one in found]

    def ids(self) -> set[str]:
        """Of the versions that have objects."""
        return {key.partition("/")[0] for key in self.keys()}

    def read(self, key: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=BUCKET, Key=f"{self.name}/{key}")["Body"].read()
        return content

    def write(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=f"{self.name}/{key}", Body=content)

    def flip(self, key: str) -> None:
        """One bit of the last byte."""
        content = self.read(key)
        self.write(key, content[:-1] + bytes([content[-1] ^ 1]))

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=f"{self.name}/{key}")


@pytest.fixture
def s3_prefix(s3: Any) -> Prefix:
    return Prefix(s3, f"prefix-{next(_numbers)}")
