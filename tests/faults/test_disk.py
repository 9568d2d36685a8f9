"""A full disk, a real one where the kernel lets us mount a small file system of our own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest_databases import NewDatabase
from tests.worker_stack.stack import ROOT

pytestmark = pytest.mark.slow
IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


def may_mount() -> bool:
    return subprocess.run([*IN_A_NAMESPACE, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="this kernel gives no user namespaces to mount a small disk in")
def test_a_full_disk_harms_nothing_and_is_survived(tmp_path: Path, new_sqlite: NewDatabase) -> None:
    program = (
        f"mount -t tmpfs -o size=2m none {tmp_path} && "
        f"TMPDIR={tmp_path} exec {sys.executable} -m tests.faults.small_disk '{new_sqlite(True)}'"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    end = subprocess.run(
        [*IN_A_NAMESPACE, program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )
    assert end.returncode == 0, end.stderr[-4000:]
