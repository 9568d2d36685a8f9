"""`ratchet up` with vLLM: versions are swapped under load and rolled back, and a killed engine comes back."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from artifacts import base_models
from artifacts.opening import open_store
from domain.settings import Settings
from registry.session import make_engine, make_sessions
from tests.acceptance import test_demo_short as on_the_embedded_engine
from tests.integration.http.publishing import add_version
from tests.integration.test_up import Up, processes_of, until
from tests.vllm.adapters import BASE, weights, write, write_whole
from tests.vllm.server import PROMPT, START_SECONDS

SAME = 0.2
"""Two computations of one thing in bfloat16 differ by less, in batches of any shape."""


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_ENGINE", "vllm")
    monkeypatch.setenv("RATCHET_ENGINE_THREADS", "1")
    monkeypatch.setenv("RATCHET_ENGINE_BATCH_ADAPTERS", "2")
    monkeypatch.setenv("RATCHET_VLLM_ARGS", "--max-model-len 1024 --max-num-seqs 8")


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ratchet-up-") as folder:
        yield Path(folder)
        left = processes_of(Path(folder))
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, "the test left processes"


def answer(client: httpx.Client, model: str = "helper") -> tuple[str, list[float]]:
    """(version, what it makes of PROMPT's tokens)."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 0, "echo": True}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    values = reply.json()["choices"][0]["logprobs"]["token_logprobs"][1:-1]
    return reply.headers["x-model-version"], values


def servers(home: Path) -> list[int]:
    """The guards of the running vLLM servers."""
    return [pid for pid, line in processes_of(home).items() if "guard.py" in line]


class Load:
    """Clients that ask without pause until told to stop."""

    def __init__(self, url: str, clients: int) -> None:
        self.answers: list[tuple[str, list[float]]] = []
        self.problems: list[str] = []
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=240) as client:
            while not self._stop.is_set():
                try:
                    self.answers.append(answer(client))
                except (AssertionError, httpx.HTTPError) as error:
                    self.problems.append(str(error))


def test_versions_swap_under_load_roll_back_and_survive_a_killed_engine(home: Path) -> None:
    up = Up(home)
    try:
        url = up.ready()
        with httpx.Client(base_url=url, timeout=240) as client:
            made = client.post("/v1/assistants", json={"name": "helper", "base_model": BASE})
            assert made.status_code == 201, made.text
            assert answer(client)[0] == "v0"
            settings = Settings(home=home)
            sessions = make_sessions(make_engine(settings.resolved_database_url))

            def add() -> str:
                number = add_version(
                    sessions,
                    open_store(settings),
                    settings.work_dir,
                    "helper",
                    write=lambda folder, number: write(folder, weights(number)),
                )
                until(lambda: answer(client)[0] == f"v{number}", 60, f"v{number} does not serve")
                return f"v{number}"

            with Load(url, clients=4) as load:
                assert [add(), add()] == ["v1", "v2"]
                for _ in range(3):
                    back = client.post("/v1/assistants/helper/rollback", json={"to": "v1", "reason": "test"})
                    assert (back.status_code, back.json()["serving"]) == (200, True), back.text
                    assert answer(client)[0] == "v1"
                    body = {"version": "v2", "reason": "test"}
                    forth = client.put("/v1/assistants/helper/aliases/champion", json=body)
                    assert (forth.status_code, forth.json()["serving"]) == (200, True), forth.text
                    assert answer(client)[0] == "v2"
            assert load.problems == []
            quiet = {name: answer(client, f"helper@{name}") for name in ("v0", "v1", "v2")}
            assert {version for version, _ in load.answers} == quiet.keys()
            for version, values in load.answers:
                told = [
                    name
                    for name, (_, expected) in quiet.items()
                    if values == pytest.approx(expected, abs=SAME)
                ]
                assert told == [version]

            [server] = servers(home)
            os.killpg(server, signal.SIGKILL)
            body = {"model": "helper", "prompt": PROMPT, "max_tokens": 1}
            lost = client.post("/v1/completions", json=body)
            assert lost.status_code in (200, 503), lost.text
            until(
                lambda: client.post("/v1/completions", json=body).status_code == 200,
                START_SECONDS,
                "not back",
            )
            version, values = answer(client)
            assert (version, values) == ("v2", pytest.approx(quiet["v2"][1], abs=SAME))
        up.kill()
        until(lambda: processes_of(home) == {}, 20, f"orphans: {processes_of(home)}")
    finally:
        up.kill()


@pytest.mark.timeout(1500)
def test_a_whole_model_is_swapped_in_by_a_second_server_and_back(home: Path) -> None:
    """The old version answers until the new one's server does; a rollback soon after waits for nothing."""
    base = base_models.resolve(BASE, Settings().cache_dir).path
    up = Up(home, RATCHET_VERSION_IDLE_SECONDS="5")
    try:
        url = up.ready()
        with httpx.Client(base_url=url, timeout=240) as client:
            assert client.post("/v1/assistants", json={"name": "helper", "base_model": BASE}).is_success
            before = answer(client)
            assert before[0] == "v0"
            settings = Settings(home=home)
            with Load(url, clients=1) as load:
                add_version(
                    make_sessions(make_engine(settings.resolved_database_url)),
                    open_store(settings),
                    settings.work_dir,
                    "helper",
                    write=lambda folder, _: write_whole(folder, base),
                    kind="full",
                )
                until(lambda: answer(client)[0] == "v1", START_SECONDS, "v1 does not serve")
                after = answer(client)
                rollback = client.post("/v1/assistants/helper/rollback", json={"to": "v0", "reason": "test"})
                assert rollback.json()["serving"] is True, rollback.text
                assert answer(client)[0] == "v0"
            assert load.problems == []
            assert after[1] != pytest.approx(before[1], abs=2 * SAME)
            expected = {"v0": before[1], "v1": after[1]}
            for version, values in load.answers:
                assert values == pytest.approx(expected[version], abs=SAME)
            until(lambda: len(servers(home)) == 1, 60, "the second server still holds its memory")
            assert answer(client)[0] == "v0"
        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(60) == 0
    finally:
        up.kill()


@pytest.mark.timeout(2000)
def test_the_embedded_engine_s_acceptance_test_passes_on_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real updates, trained a few steps, measured through vLLM, swapped and rolled back under a chat."""
    monkeypatch.setattr(on_the_embedded_engine, "SECONDS", 1900)
    on_the_embedded_engine.test_two_updates_two_swaps_and_a_rollback_without_a_failed_request(tmp_path)
