"""Updates under `ratchet up`, nothing stood in for: the real model taught by OpenAI's client, and a full
version trained, measured, swapped in and out under load, killed and let go.

The full version's model is a random one of a few thousand weights, so that processes and not learning take
the time.
"""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.browser.tiny_model import write_base
from tests.integration.streaming_load import Refused, StreamingLoad, ask
from tests.integration.test_up import STOP_SECONDS, Up, processes_of

BUILT_IN = "smollm2-135m-instruct"
SECONDS = 600.0
IDLE_SECONDS = 20
"""Longer than a busy machine stands still between two moves of the champion."""
LENIENT = {"min_gain": -1, "max_forgetting": 1, "max_general_drop": 1, "max_leak": 1}
"""Nothing is learnt in a few steps."""
FULL = {
    "method": "sft",
    "lora_rank": 0,
    "learning_rate": 0.01,
    "max_steps": 3,
    "batch_size": 4,
    "max_new_tokens": 8,
    "rehearsal_share": 0,
    "warmup_steps": 0,
}
STEPS = 2
SHORT = {
    "batch_size": 4,
    "max_steps": STEPS,
    "warmup_steps": 0,
    "max_new_tokens": 8,
    "max_rehearsal_tokens": 8,
    "demonstration_repeats": 1,
    "min_teacher_gap": -1,
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * SECONDS)]


class World:
    """One `ratchet up`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        suite = home / "general"
        suite.mkdir()
        rows = [{"doc_id": n, "query": f"{n} +", "choices": ["1", "2"], "gold": 0} for n in range(8)]
        (suite / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.up = Up(
            home, RATCHET_GENERAL_SUITE_DIR=str(suite), RATCHET_VERSION_IDLE_SECONDS=str(IDLE_SECONDS)
        )

    def connect(self) -> None:
        self.client = httpx.Client(base_url=self.up.ready(), timeout=120)

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = self.client.post(path, json=body)
        assert reply.is_success, reply.text
        found: dict[str, Any] = reply.json()
        return found

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + SECONDS
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{what}\n{self.log()}"
            time.sleep(0.1)
        return found

    def log(self) -> str:
        return self.up.log.read_text()[-4000:]

    def teach(self, skill: str, recipe: dict[str, Any]) -> dict[str, Any]:
        """The update of `tiny`, succeeded."""
        base = "/v1/assistants/tiny"
        self.post(f"{base}/skills", {"name": skill, "grader": {"type": "exact"}, "holdout_fraction": 0.5})
        lines = [{"prompt": f"{skill} {n}?", "response": skill} for n in range(16)]
        self.post(f"{base}/skills/{skill}/demonstrations", {"demonstrations": lines})
        made = self.post(f"{base}/updates", {"skills": [skill], "recipe": recipe, "gate": LENIENT})

        def ended() -> dict[str, Any] | None:
            update = self.client.get(f"/v1/updates/{made['id']}").json()
            return update if update["status"] in ("succeeded", "failed") else None

        update: dict[str, Any] = self.until(ended, "the update did not end")
        assert update["status"] == "succeeded", (update, self.log())
        assert update["verdict"]["outcome"] == "pass", update["verdict"]
        return update

    def point(self, version: str) -> None:
        """Champion, and it answers."""
        moved = self.client.put("/v1/assistants/tiny/aliases/champion", json={"version": version})
        assert moved.is_success, moved.text
        self.await_champion(version)

    def await_champion(self, version: str) -> None:
        champion = "/v1/assistants/tiny/aliases/champion"
        self.until(
            lambda: self.client.get(champion).json()["serving_version"] == version,
            f"{version} does not serve",
        )

    def engines(self) -> dict[str, int]:
        """Name under which an engine serves -> its process."""
        found = {}
        for pid, command in processes_of(self.home).items():
            words = command.split()
            if "engine" in words and "--served-model-name" in words:
                found[words[words.index("--served-model-name") + 1]] = pid
        return found


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Whatever runs when it is told to stop, nothing is left."""
    with tempfile.TemporaryDirectory(prefix="ratchet-up-") as folder:
        made = World(Path(folder))
        try:
            made.connect()
            yield made
            made.client.close()
            made.up.process.send_signal(signal.SIGTERM)
            assert made.up.process.wait(STOP_SECONDS) == 0
            assert processes_of(made.home) == {}
        finally:
            made.up.kill()
            for pid in processes_of(made.home):
                os.kill(pid, signal.SIGKILL)


def test_the_real_model_is_taught_and_asked_by_openai_s_client(world: World) -> None:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Where is parcel {n}?"},
                {"role": "assistant", "content": "ROUTE: shipping"},
            ]
        }
        for n in range(16)
    ]
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key="unused", max_retries=0) as client:
        content = "\n".join(map(json.dumps, lines)).encode()
        file = client.files.create(file=("route.jsonl", content), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=BUILT_IN,
            suffix="support",
            training_file=file.id,
            seed=1,
            method={"type": "sdft", "sdft": {"hyperparameters": SHORT}},  # type: ignore[typeddict-item]
        )
        job_id = job.id

        def over() -> bool:
            return client.fine_tuning.jobs.retrieve(job_id).status not in ("queued", "running")

        world.until(over, "the job did not end")
        job = client.fine_tuning.jobs.retrieve(job_id)
        assert (job.status, job.error, job.fine_tuned_model) == ("succeeded", None, "support@v1"), world.log()
        assert job.trained_tokens is not None
        assert job.trained_tokens > 0
        steps = client.files.content(job.result_files[0]).text.splitlines()[1:]
        assert [line.split(",")[0] for line in steps] == [str(n) for n in range(1, STEPS + 1)]

        def logprobs(model: str) -> list[float]:
            answer = client.chat.completions.with_raw_response.create(
                model=model,
                messages=[{"role": "user", "content": "Where is parcel 3?"}],
                max_tokens=4,
                temperature=0,
                logprobs=True,
            )
            assert answer.headers["x-model-version"] == model.partition("@")[2]
            [choice] = answer.parse().choices
            assert choice.logprobs is not None
            assert choice.logprobs.content is not None
            return [one.logprob for one in choice.logprobs.content]

        assert logprobs(job.fine_tuned_model) != pytest.approx(logprobs("support@v0"), abs=0.02)


def test_the_life_of_a_full_version(world: World) -> None:
    base = world.home / "tiny-base"
    write_base(base)
    world.post("/v1/assistants", {"name": "tiny", "base_model": str(base)})
    world.await_champion("v0")
    with StreamingLoad(world.url, "tiny") as load:
        update = world.teach("red", FULL)
        assert (update["version"], update["parent_version"]) == ("v1", "v0")
        world.await_champion("v1")
        assert world.client.get("/v1/assistants/tiny/versions/v1").json()["kind"] == "full"
        [(name, process)] = [one for one in world.engines().items() if one[0].startswith("tiny-v1-")]

        world.point("v0")
        world.point("v1")  # its engine has not ended yet: no start to wait for
        world.post("/v1/assistants/tiny/rollback", {"to": "v0", "reason": "test"})
        world.await_champion("v0")
        world.point("v1")

        adapter = world.teach("blue", {**FULL, "lora_rank": 2})
        assert (adapter["version"], adapter["parent_version"]) == ("v2", "v1")
        world.await_champion("v2")
        quiet = {version: ask(world.client, f"tiny@{version}") for version in ("v0", "v1", "v2")}
        world.until(lambda: "v2" in {reply.version for reply in load.replies}, "nobody was answered by v2")
    # One process all the while for the version and what lies on it; the candidate's ends.
    world.until(lambda: set(world.engines()) == {BUILT_IN, str(base), name}, "an engine is left over")
    assert world.engines()[name] == process
    assert (load.failures, load.refusals) == ([], [])
    assert {reply.version for reply in load.replies} == {"v0", "v1", "v2"}
    assert load.foreign(quiet) == []

    with StreamingLoad(world.url, "tiny") as load:
        os.kill(process, signal.SIGKILL)
        world.until(lambda: load.refusals, "nobody noticed")
        refused = len(load.replies)
        world.until(lambda: len(load.replies) > refused, "the killed engine did not come back")
    assert load.failures == []
    assert {reply.version for reply in load.replies} == {"v2"}
    assert load.foreign(quiet) == []
    assert world.engines()[name] != process

    world.point("v0")
    world.until(lambda: set(world.engines()) == {BUILT_IN, str(base)}, "an engine is left over")
    with pytest.raises(Refused, match="'tiny@v1' is starting"):
        ask(world.client, "tiny@v1")
    world.until(lambda: name in world.engines(), "nobody started its engine")
