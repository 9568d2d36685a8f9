"""What ends a whole vLLM server: each in a server of its own."""

import contextlib
import shutil
from pathlib import Path

import httpx
import psutil

from tests.vllm.adapters import BASE, weights, write
from tests.vllm.server import Server, serving


def ended_by(server: Server, model: str, **fields: object) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        server.complete(model, **fields)
    return server.died()


def test_an_adapter_pushed_out_whose_folder_is_gone_ends_the_server(tmp_path: Path) -> None:
    """So versions' files outlive their unloading, and the controller keeps below --max-cpu-loras."""
    with serving(tmp_path, engine_adapters=4, engine_batch_adapters=2) as server:
        gone = write(tmp_path / "gone", weights(1))
        assert server.load("gone", gone).status_code == 200
        shutil.rmtree(gone)
        server.score("gone")  # from memory
        for number in range(6):
            folder = write(tmp_path / f"pushing-{number}", weights(10 + number))
            assert server.load(f"pushing-{number}", folder).status_code == 200
            server.score(f"pushing-{number}")
        assert ended_by(server, "gone")


def test_its_processes_outlive_a_killed_server(tmp_path: Path) -> None:
    """So a guard leads their group, and the supervisor ends the group."""
    with serving(tmp_path) as server:
        [api] = psutil.Process(server.process.pid).children()
        engine = api.children(recursive=True)
        assert len(engine) >= 2
        api.kill()
        assert server.died(), "the guard ends with the server"
        gone, left = psutil.wait_procs(engine, timeout=10)
        assert left, f"vLLM is mended: {gone} ended by themselves"
    assert not psutil.wait_procs(left, timeout=10)[1]


def test_a_prompts_logprobs_end_a_server_whose_output_layer_takes_adapters(tmp_path: Path) -> None:
    """So --lora-target-modules is given, and the gateway asks no server for them that may lack it."""
    with serving(tmp_path, without=["--lora-target-modules"]) as server:
        assert server.complete(BASE, echo=True).status_code == 200
        # The engine takes up the first alone, and the rest in one batch.
        prompts = [f"{number} and one are" for number in range(12)]
        assert ended_by(server, BASE, prompt=prompts, echo=True)
