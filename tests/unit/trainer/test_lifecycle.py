"""How the trainer's process ends."""

import subprocess
import sys


def test_leaving_flushes_what_was_printed_and_tears_nothing_down() -> None:
    script = (
        "import atexit, sys\n"
        "from trainer.lifecycle import leave\n"
        "atexit.register(print, 'torn down')\n"
        "print('said', end='')\n"
        "print('logged', end='', file=sys.stderr)\n"
        "leave(65)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (65, "said", "logged")
