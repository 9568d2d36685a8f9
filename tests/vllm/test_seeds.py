"""A request's seed, and prompts that are read in more than one step, which `ratchet up` makes 64 tokens."""

import contextlib
from pathlib import Path

import httpx

from tests.vllm.adapters import BASE
from tests.vllm.server import Server, serving

LONG = " ".join(f"Line {number} says {number * 7 % 13}." for number in range(40))


def drawn(server: Server, seed: int) -> str:
    reply = server.complete(BASE, prompt=LONG, seed=seed, temperature=1.5, max_tokens=16)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["prompt_tokens"] > 3 * 64
    return str(reply.json()["choices"][0]["text"])


def test_a_seed_gives_one_answer_however_its_prompt_is_cut(server: Server) -> None:
    first = drawn(server, 5)
    # By now the prompt is in the prefix cache, all but its end, which is one step.
    assert drawn(server, 5) == first
    assert drawn(server, 6) != first


def test_it_survives_beside_other_prompts(server: Server) -> None:
    others = [lambda number=number: server.complete(BASE, prompt=f"{number} {LONG}") for number in range(4)]
    server.together([lambda: drawn(server, 7), *others, lambda: drawn(server, 8)])
    assert server.answers()


def test_without_ratchets_extension_it_ends_the_server(tmp_path: Path) -> None:
    """So the extension is loaded on the CPU."""
    with serving(tmp_path, without=["--worker-extension-cls"]) as server:
        assert server.complete(BASE, seed=5, temperature=1.0).status_code == 200
        with contextlib.suppress(httpx.HTTPError):
            server.complete(BASE, prompt=LONG, seed=5, temperature=1.0)
        assert server.died(), "vLLM is mended: the extension is no longer needed"
