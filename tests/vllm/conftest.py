"""What Ratchet relies on in vLLM's CPU build, so that an upgrade that changes it is seen (`make test-vllm`).

One server serves all tests that leave it alive; those that end one start their own.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.components import require_vllm
from cli.errors import CliError
from domain.settings import Settings
from tests.vllm.adapters import weights, write
from tests.vllm.server import Server, serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    try:
        require_vllm(Settings(engine="vllm"))
    except CliError as error:
        pytest.exit(f"no test of vLLM can run: {error}", returncode=3)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), engine_adapters=5, engine_batch_adapters=2) as started:
        yield started


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", weights(1))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write(tmp_path / "other", weights(2))
