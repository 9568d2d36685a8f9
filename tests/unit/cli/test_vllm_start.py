"""vLLM's command line, its zero adapter, and the guard around its processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli import guard, launch, vllm_start
from cli.components import require_vllm
from cli.errors import CliError
from cli.supervisor import spawn
from domain.settings import Settings
from serving.validation import validate_adapter
from tests.unit.cli.test_supervisor import is_running, until

CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def flags(command: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in command:
        if word.startswith("--"):
            found[word] = []
        elif found:
            found[list(found)[-1]].append(word)
    return found


def test_on_a_gpu_the_base_is_served_as_itself(tmp_path: Path, base: Path) -> None:
    settings = Settings(
        home=tmp_path, engine="vllm", engine_adapters=32, engine_batch_adapters=4, engine_max_rank=64
    )
    found = flags(vllm_start.command(settings, "org/model", base, "8123", gpu=True))
    assert found["--served-model-name"] == ["org/model"]
    assert (found["--max-loras"], found["--max-cpu-loras"], found["--max-lora-rank"]) == (
        ["4"],
        ["32"],
        ["64"],
    )
    assert (found["--host"], found["--port"]) == (["127.0.0.1"], ["8123"])
    assert "--lora-modules" not in found
    assert "--worker-extension-cls" not in found
    assert not (tmp_path / "zero-adapters").exists()


def test_on_a_cpu_the_base_is_served_through_zeros(tmp_path: Path, base: Path) -> None:
    settings = Settings(home=tmp_path, engine="vllm", engine_adapters=32, engine_batch_adapters=4)
    found = flags(vllm_start.command(settings, "org/model", base, "8123", gpu=False))
    assert found["--served-model-name"] == ["bare:org/model"]
    assert found["--worker-extension-cls"] == ["ratchet_seeds.Worker"]
    # One more of each: the zeros take a place.
    assert (found["--max-loras"], found["--max-cpu-loras"], found["--max-lora-rank"]) == (
        ["5"],
        ["33"],
        ["16"],
    )
    [card] = map(json.loads, found["--lora-modules"])
    assert (card["name"], card["base_model_name"]) == ("org/model", "bare:org/model")
    weights = Path(card["path"]) / "adapter_model.safetensors"
    validate_adapter(weights.parent, CONFIG, base_model="org/model")
    length = int.from_bytes(weights.read_bytes()[:8], "little")
    assert set(weights.read_bytes()[8 + length :]) == {0}
    before = weights.stat()
    vllm_start.command(settings, "org/model", base, "8124", gpu=False)
    assert weights.stat().st_ino == before.st_ino, "an engine may read it: it is written once"


def test_arguments_of_the_user_come_last_and_are_split_as_in_a_shell(tmp_path: Path, base: Path) -> None:
    settings = Settings(home=tmp_path, engine="vllm", vllm_args="--dtype float32 --note 'a b'")
    command = vllm_start.command(settings, "m", base, "1", gpu=True)
    assert command[-4:] == ["--dtype", "float32", "--note", "a b"]


def test_vllm_sees_nothing_of_ratchets_import_path_and_keeps_what_the_user_set(tmp_path: Path) -> None:
    given = {"PYTHONPATH": "/ratchet", "VLLM_CPU_KVCACHE_SPACE": "7", "PATH": "/bin"}
    made = vllm_start.environment(given, Settings(home=tmp_path, engine_threads=3))
    assert made["PYTHONPATH"] == str(vllm_start.WORKER_FOLDER)
    assert [path.name for path in vllm_start.WORKER_FOLDER.glob("*.py")] == ["ratchet_seeds.py"]
    assert (made["VLLM_CPU_KVCACHE_SPACE"], made["OMP_NUM_THREADS"], made["PATH"]) == ("7", "3", "/bin")
    assert made["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert "VLLM_SERVER_DEV_MODE" not in made


def test_a_missing_environment_names_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="make vllm"):
        require_vllm(Settings(home=tmp_path, engine="vllm", vllm_python=tmp_path / "python"))
    require_vllm(Settings(home=tmp_path, engine="vllm", vllm_python=Path(sys.executable)))


SERVER = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def stop(*_):
    child.terminate()
    open(sys.argv[1] + ".stopped", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1] + ".new", "w").write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys, time
python = [sys.executable, "-I", "-S"]
me = str(os.getpid())
guarded = [*python, sys.argv[1], me, "15", *python, sys.argv[2], me, *sys.argv[3:]]
print(subprocess.Popen(guarded, start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def started(pids: Path) -> list[int]:
    until(pids.exists)
    return [int(pid) for pid in pids.read_text().split()]


def test_kill_9_of_the_parent_takes_the_servers_children_along(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    command = [
        sys.executable,
        "-c",
        PARENT,
        launch.__file__,
        guard.__file__,
        sys.executable,
        "-c",
        SERVER,
        str(pids),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        everyone = [int(parent.stdout.readline()), *started(pids)]
        assert all(map(is_running, everyone))
        parent.kill()
        until(lambda: not any(map(is_running, everyone)))
    assert not (tmp_path / "pids.stopped").exists()


def test_a_stop_by_the_parent_is_passed_on(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    guarded = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), sys.executable, "-c", SERVER]
    process = spawn([*guarded, str(pids)], death_signal=signal.SIGTERM)
    everyone = started(pids)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    until(lambda: not any(map(is_running, everyone)))
    assert (tmp_path / "pids.stopped").exists()


def test_when_the_guard_is_killed_the_server_dies(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    guarded = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), sys.executable, "-c", SERVER]
    process = spawn([*guarded, str(pids)], death_signal=signal.SIGTERM)
    server, child = started(pids)
    process.kill()
    process.wait()
    until(lambda: not is_running(server))
    os.kill(child, signal.SIGKILL)  # the supervisor kills the group, as in Child.note_exit
