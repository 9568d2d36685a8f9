"""What vLLM does with adapters that come, go, or change on disk while it serves."""

import json
import threading
import time
from pathlib import Path

import pytest

from tests.vllm.adapters import BASE, overwrite, weights, write
from tests.vllm.server import BARE, PROMPT, Server

SAME = 0.2
"""Two computations of one thing in bfloat16 differ by less, in batches of any shape."""
WORDS = ("river", "lamp", "seven", "under", "quickly", "green", "because", "table", "sings", "north", "half")
LONG = " ".join(WORDS[number * number * 7 % 11 + number % 3 - 2] for number in range(500))
"""Several blocks of the prefix cache, and no saying how it goes on."""


def differ(left: list[float], right: list[float]) -> bool:
    return max(abs(a - b) for a, b in zip(left, right, strict=True)) > SAME


def evict_all(server: Server, tmp_path: Path, mark: str) -> None:
    """Use as many other adapters as the engine holds, so that none but these is left in it."""
    for number in range(6):
        folder = write(tmp_path / f"{mark}-{number}", weights(100 + number))
        assert server.load(f"{mark}-{number}", folder).status_code == 200
        server.score(f"{mark}-{number}")
        server.unload(f"{mark}-{number}")


def test_adapters_differ_from_the_base_and_each_other(server: Server, adapter: Path, other: Path) -> None:
    server.load("one", adapter)
    server.load("two", other)
    scores = [server.score(model) for model in (BASE, "one", "two")]
    assert differ(scores[0], scores[1])
    assert differ(scores[0], scores[2])
    assert differ(scores[1], scores[2])
    assert not differ(scores[0], server.score(BARE)), "the adapter of zeros is the base"
    server.unload("one")
    server.unload("two")


def test_beside_an_adapter_the_bare_base_is_wrong_and_the_adapter_of_zeros_right(
    server: Server, adapter: Path, other: Path
) -> None:
    """vLLM's CPU kernels take the missing adapter's slot, -1, for the last one."""
    alone = server.score(BASE)
    wrong = 0
    for turn in range(6):  # which of them the last slot holds depends on what was used before
        names = [f"beside-{turn}-{number}" for number in range(2)]
        for name, folder in zip(names, (adapter, other), strict=True):
            server.load(name, folder)
        models = [names[0], BARE, names[1], BARE] * 2 + [BASE] * (turn % 2)
        scores = server.together([lambda model=model: server.score(model) for model in models])
        wrong += sum(
            differ(score, alone) for model, score in zip(models, scores, strict=True) if model == BARE
        )
        models = [names[0], BASE, names[1], BASE] * 2
        scores = server.together([lambda model=model: server.score(model) for model in models])
        assert not any(differ(score, alone) for score in scores[1::2])
        for name in names:
            server.unload(name)
        if wrong:
            return
    pytest.fail("vLLM is mended: the bare base can be served as itself on the CPU too")


def test_prompts_are_scored_beside_others_when_the_output_layer_has_no_adapters(
    server: Server, adapter: Path
) -> None:
    server.load("scored", adapter)
    alone = {model: server.score(model) for model in (BASE, "scored")}
    models = [BASE, "scored"] * 3
    for model, score in zip(
        models, server.together([lambda model=model: server.score(model) for model in models]), strict=True
    ):
        assert not differ(score, alone[model])
    # What a prompt's last token scores is what it scores when it is sampled.
    sampled = server.logprobs("scored", "The capital of France is")
    text = server.complete("scored", "The capital of France is").json()["choices"][0]["text"]
    echoed = server.logprobs("scored", f"The capital of France is{text}", echo=True)
    assert echoed[-2] == pytest.approx(sampled[0], abs=SAME)
    server.unload("scored")


def test_unloading_takes_the_name_away_and_requests_in_flight_finish(server: Server, adapter: Path) -> None:
    server.load("leaving", adapter)
    fields = {"max_tokens": 60, "ignore_eos": True}
    whole = server.complete("leaving", **fields).json()["choices"][0]["logprobs"]["token_logprobs"]
    began = threading.Event()
    seen: list[float] = []

    def stream() -> None:
        body = {"model": "leaving", "prompt": PROMPT, "temperature": 0.0, "logprobs": 1, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body | fields) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    seen.extend(json.loads(line[6:])["choices"][0]["logprobs"]["token_logprobs"])
                    began.set()

    reader = threading.Thread(target=stream)
    reader.start()
    assert began.wait(120)
    assert server.unload("leaving").status_code == 200
    assert len(seen) < 60, "unloaded while it answers"
    assert server.complete("leaving").status_code == 404
    reader.join(120)
    assert seen == pytest.approx(whole, abs=SAME)
    assert server.unload("leaving").status_code == 404


def test_overwritten_files_are_seen_when_the_adapter_comes_back_from_disk(
    server: Server, tmp_path: Path, adapter: Path
) -> None:
    """More adapters than --max-cpu-loras push one out; it is read again, silently, at its next request."""
    server.load("changed", adapter)
    before = server.score("changed")
    overwrite(adapter, weights(2))
    assert not differ(server.score("changed"), before)
    evict_all(server, tmp_path, "evict")
    assert differ(server.score("changed"), before)
    server.unload("changed")


def test_a_name_and_path_used_again_answers_from_a_stale_prefix_cache(server: Server, adapter: Path) -> None:
    server.load("again", adapter)
    server.logprobs("again", LONG)
    server.unload("again")
    overwrite(adapter, weights(2))
    server.load("again", adapter)
    stale = server.logprobs("again", LONG, max_tokens=3)
    fresh_folder = write(adapter.parent / "fresh", weights(2))
    server.load("fresh", fresh_folder)
    fresh = server.logprobs("fresh", LONG, max_tokens=3)
    cold = server.logprobs("fresh", LONG, max_tokens=3, cache_salt="cold")
    server.unload("again")
    server.unload("fresh")
    assert not differ(fresh, cold)
    assert differ(stale, fresh), "vLLM is mended: names could be used again"


def test_load_inplace_reads_the_files_at_every_step_from_then_on(server: Server, adapter: Path) -> None:
    assert server.load("inplace", adapter).status_code == 200
    assert server.load("inplace", adapter, load_inplace=True).status_code == 200
    before = server.logprobs("inplace", cache_salt="1")
    overwrite(adapter, weights(2))
    after = server.logprobs("inplace", cache_salt="2")
    server.unload("inplace")
    assert differ(before, after), "vLLM is mended: an adapter in place is read once"


def test_more_adapters_than_fit_a_batch_wait_for_each_other(server: Server, tmp_path: Path) -> None:
    names = [f"many-{number}" for number in range(4)]
    for number, name in enumerate(names):
        assert server.load(name, write(tmp_path / name, weights(10 + number))).status_code == 200
    alone = [server.score(name) for name in names]
    both = server.together([lambda name=name: server.score(name) for name in names * 2])
    for name in names:
        server.unload(name)
    assert not any(differ(score, alone[index % 4]) for index, score in enumerate(both))


def test_loading_takes_well_below_a_second(server: Server, adapter: Path) -> None:
    started = time.monotonic()
    server.load("quick", adapter)
    seconds = time.monotonic() - started
    server.unload("quick")
    assert seconds < 10  # on a busy machine; 0.04 on a quiet one
