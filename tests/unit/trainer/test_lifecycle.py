"""How the trainer's processes end: each by itself, and those that train together."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from trainer.launch import cause_of

ROOT = Path(__file__).parents[3]
HEAD = """
import atexit, os, sys, time
from trainer import distributed
from trainer.lifecycle import run_to_end

atexit.register(print, "torn down")
"""


def run(folder: Path, main: str, processes: int = 1) -> "subprocess.CompletedProcess[str]":
    """A script with this `main` in so many processes that torchrun starts, or in one of its own."""
    script = folder / "script.py"
    script.write_text(f"{HEAD}{main}\nrun_to_end(main)\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(script)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_what_was_printed_is_flushed_and_nothing_torn_down(tmp_path: Path) -> None:
    main = (
        'def main():\n    print("said", end="")\n    print("logged", end="", file=sys.stderr)\n    return 65'
    )
    done = run(tmp_path, main)
    assert (done.returncode, done.stdout, done.stderr) == (65, "said", "logged")


def test_an_exception_is_told_and_ends_with_status_1(tmp_path: Path) -> None:
    done = run(tmp_path, 'def main():\n    raise ValueError("not finite")')
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: not finite\n")


def test_nobody_leaves_before_the_first_process_has_spoken(tmp_path: Path) -> None:
    """torchrun ends it as soon as the other one has left with a status that is not 0."""
    main = """
def main():
    with distributed.joined():
        if distributed.is_first():
            time.sleep(2)
            print("refused", flush=True)
    return 65
"""
    assert run(tmp_path, main, processes=2).stdout == "refused\n"


def test_one_that_fails_ends_the_others_and_tells_why(tmp_path: Path) -> None:
    """What the other one meets is a closed connection, which it tells in a line."""
    main = """
def main():
    with distributed.joined():
        distributed.add_up(1.0)
        if not distributed.is_first():
            raise ValueError("not finite")
        distributed.add_up(1.0)
"""
    told = run(tmp_path, main, processes=2).stderr
    assert "ValueError: not finite\n" in told
    assert "trainer process 0 failed after another: RuntimeError: " in told
    assert told.count("Traceback") == 2  # this one's and torchrun's own


def failure(rank: int, exitcode: int, second: int) -> ProcessFailure:
    made = ProcessFailure(local_rank=rank, pid=rank, exitcode=exitcode, error_file="")
    made.timestamp = second
    return made


@pytest.mark.parametrize(
    ("endings", "cause"),
    [
        ([(65, 7), (-15, 7)], 0),  # the second was ended by torchrun
        ([(-15, 7), (65, 7)], 1),
        ([(1, 7), (-9, 7)], 1),  # the first lost its connection to one that was killed
        ([(-9, 37), (1, 7)], 1),  # the first did not end when it was asked to
        ([(1, 7), (1, 7)], 0),
    ],
)
def test_the_cause_is_what_made_the_others_fail(endings: list[tuple[int, int]], cause: int) -> None:
    failures = [failure(rank, exitcode, second) for rank, (exitcode, second) in enumerate(endings)]
    assert cause_of(failures).local_rank == cause
