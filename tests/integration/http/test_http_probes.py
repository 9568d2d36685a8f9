"""Which engines are asked to let the controller's probes go first."""

from pathlib import Path

import pytest

from domain.settings import Settings
from tests.integration.http.publishing import publish
from tests.integration.http.stack import running


@pytest.mark.parametrize(
    ("change", "priorities"),
    [
        ({"engine": "embedded"}, {-1}),
        ({"engine": "vllm"}, {-1}),
        # A server of one's own may be a vLLM that refuses a priority.
        ({"engine": "embedded", "engine_url": "http://127.0.0.1:9"}, {None}),
        ({"engine": "vllm", "engine_url": "http://127.0.0.1:9"}, {None}),
    ],
)
def test_probes_go_first_on_engines_that_ratchet_starts(
    settings: Settings, base_folder: Path, change: dict[str, str], priorities: set[int | None]
) -> None:
    with running(settings.model_copy(update=change), base_folder) as stack:
        publish(stack.context, "support")
        stack.await_version(1)
        assert stack.engine.priorities == priorities
