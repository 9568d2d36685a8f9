"""`ratchet bench` starts a benchmark with its own options and ends with its exit status."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from cli import bench
from cli.errors import CliError


def test_every_command_has_its_module() -> None:
    assert all(find_spec(module) is not None for module, _ in bench.BENCHMARKS.values())


def test_options_and_exit_status_are_the_benchmarks() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli", "bench", "trainer", "--trl-micro-batch", "5", "--batch-size", "16"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--trl-micro-batch must divide --batch-size" in done.stderr


def test_an_installation_without_benchmarks_says_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(
        CliError, match=r"from a checkout that was installed with pip install -e '\.\[train,bench\]'"
    ):
        bench.run_benchmark("benchmarks.trainer_speed", [])
