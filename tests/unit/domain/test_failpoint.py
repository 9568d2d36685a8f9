"""Failpoints: off unless armed, at one place, once."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from domain.failpoint import VARIABLE, arm, failpoint

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm(None)


def test_only_the_named_place_and_only_once(tmp_path: Path) -> None:
    failpoint("here")
    arm(f"here full {tmp_path / 'a marker'}")
    failpoint("elsewhere")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No space left") as raised:
        failpoint("here")
    assert raised.value.errno == errno.ENOSPC
    failpoint("here")
    arm("")
    (tmp_path / "a marker").unlink()
    failpoint("here")


def test_the_environment_arms_a_process_and_kill_ends_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from domain.failpoint import failpoint; failpoint('x'); print('alive')"]
    environment = os.environ | {VARIABLE: f"x kill {tmp_path / 'marker'}", "PYTHONPATH": str(ROOT)}
    ends = [subprocess.run(command, env=environment, capture_output=True, cwd=ROOT) for _ in range(2)]
    assert [(end.returncode, end.stdout) for end in ends] == [(-signal.SIGKILL, b""), (0, b"alive\n")]


@pytest.mark.parametrize("text", ["here", "here explode /tmp/x", "here kill"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=VARIABLE):
        arm(text)
