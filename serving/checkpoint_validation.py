"""Checks of a full checkpoint's folder before an engine may run it.

vLLM serves what lacks tensors or holds NaN without a word, and dies of what is cut off. A full version
differs from its base in the values of its weights alone, so all the rest is compared with the base.
"""

import json
import mmap
from pathlib import Path

import numpy as np

from domain.errors import CorruptArtifact
from domain.version import is_companion
from serving.validation import Tensor, read_header

INDEX = "model.safetensors.index.json"
CHUNK = 1 << 22
"""Values checked at a time: bounds the memory of the finite test."""
_EXPONENTS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}
"""numpy's name of an unsigned number of that width, and the bits of its exponent."""
_WEIGHTS = "model*.safetensors"
_TIED = "lm_head.weight"
_COMPUTED = ".rotary_emb.inv_freq"


def validate_checkpoint(folder: Path, base: Path) -> Path:
    """`folder` itself, when it is the whole model in the folder `base` with other weights.

    Raises CorruptArtifact naming the file and what is wrong with it.
    """
    try:
        _compare_companions(folder, base)
        _compare_weights(folder, _weights(folder, values=True), base, _weights(base, values=False))
    except (OSError, ValueError) as error:
        raise _corrupt(folder, str(error)) from error
    return folder


def _compare_companions(folder: Path, base: Path) -> None:
    expected = {path.name for path in base.iterdir() if path.is_file() and is_companion(path.name)}
    found = {path.name for path in folder.iterdir() if is_companion(path.name)}
    for name in sorted(expected ^ found):
        state = "missing" if name in expected else "not a file of the base model"
        raise _corrupt(folder / name, state)
    for name in sorted(expected):
        if (folder / name).read_bytes() != (base / name).read_bytes():
            raise _corrupt(folder / name, "differs from the base model's")


def _compare_weights(folder: Path, found: dict[str, Tensor], base: Path, expected: dict[str, Tensor]) -> None:
    config = json.loads((base / "config.json").read_bytes())
    for name in sorted(found.keys() - expected.keys()):
        raise _corrupt(folder, f"the base model has no '{name}'")
    for name, tensor in sorted(expected.items()):
        if name in found:
            if found[name].shape != tensor.shape:
                shapes = f"{list(found[name].shape)}, in the base model {list(tensor.shape)}"
                raise _corrupt(folder, f"'{name}' is {shapes}")
        elif not (name == _TIED and config.get("tie_word_embeddings") is True) and not name.endswith(
            _COMPUTED
        ):
            raise _corrupt(folder, f"'{name}' is missing")


def _weights(folder: Path, *, values: bool) -> dict[str, Tensor]:
    """Every tensor in the folder by name; with `values` they are checked to be finite."""
    found: dict[str, Tensor] = {}
    held_by: dict[str, str] = {}
    for path in sorted(folder.glob(_WEIGHTS)):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tensors = read_header(data, path)
            for name, tensor in tensors.items():
                if name in found:
                    raise _corrupt(path, f"'{name}' stands in {held_by[name]} too")
                if values and not _finite(data, tensor):
                    raise _corrupt(path, f"'{name}' holds NaN or infinity")
                held_by[name] = path.name
        found |= tensors
    if not found:
        raise _corrupt(folder, f"no {_WEIGHTS}")
    index = folder / INDEX
    if index.exists() and json.loads(index.read_bytes()).get("weight_map") != held_by:
        raise _corrupt(index, "does not say where the weights are")
    if len(set(held_by.values())) > 1 and not index.exists():
        raise _corrupt(index, "missing")
    return found


def _finite(data: mmap.mmap, tensor: Tensor) -> bool:
    """Whether no value of the tensor is NaN or infinite."""
    width, exponent = _EXPONENTS[tensor.dtype]
    size = np.dtype(width).itemsize
    for start in range(tensor.start, tensor.stop, CHUNK * size):
        # Copied, since arrays over the map itself would keep it from closing. An exponent of all ones is
        # infinity or NaN.
        bits = np.frombuffer(data[start : min(start + CHUNK * size, tensor.stop)], dtype=width)
        if bool(np.any(bits & exponent == exponent)):
            return False
    return True


def _corrupt(path: Path, what: str) -> CorruptArtifact:
    return CorruptArtifact(f"{path}: {what}.")
