"""`ratchet bench`: the benchmarks of a checkout, each a process of its own with its own options."""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from cli.components import python_path
from cli.errors import CliError

BENCHMARKS = {
    "trainer": ("benchmarks.trainer_speed", "Speed and memory of the trainer beside TRL's, and SDFT's cost."),
    "api": ("benchmarks.api_load", "Rates and latencies of the API on both databases as tables grow."),
    "serving": (
        "benchmarks.serving_load",
        "Swaps under load, the gateway's cost, many versions, a killed engine.",
    ),
    "continual": ("benchmarks.continual", "Skills taught in sequence: what is learned and what is kept."),
}
"""Command -> module and what it is about."""

bench_app = typer.Typer(
    no_args_is_help=True, help="Run a benchmark; `ratchet bench NAME --help` has its options."
)


def run_benchmark(module: str, arguments: list[str]) -> int:
    """The exit status of `python -m MODULE ARGUMENTS`.

    Raises CliError where this installation has no benchmarks.
    """
    if find_spec("benchmarks") is None:
        raise CliError(
            "the benchmarks are not part of the installed package; run this from a checkout that was "
            "installed with pip install -e '.[train,bench]'"
        )
    environment = os.environ | {"PYTHONPATH": python_path()}
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal sent it to the benchmark too, which says what it has
            continue


def _add(name: str, module: str, about: str) -> None:
    # Help is the benchmark's own: this command passes every option on.
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}

    @bench_app.command(name, help=about, add_help_option=False, context_settings=settings)
    def run(arguments: Annotated[list[str] | None, typer.Argument(metavar="[OPTIONS]")] = None) -> None:
        raise typer.Exit(run_benchmark(module, arguments or []))


for _name, (_module, _about) in BENCHMARKS.items():
    _add(_name, _module, _about)
