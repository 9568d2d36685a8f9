"""Checks of an adapter folder before an engine may load it.

vLLM accepts silently: a config rank that differs from the tensors', a wrong alpha, NaN weights, missing
or surplus layers, another base (tests/vllm). So everything that it would not refuse is refused here, but a
wrong alpha, which only the manifest's hash can tell. Torch-free: the safetensors header is JSON, the data
little-endian arrays.
"""

import json
import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from domain.errors import CorruptArtifact, EngineUnavailable

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
VISIBLE_CHANGE = 1e-6
"""Root mean square of a weight's change from which bfloat16 engines must answer differently: one step of a
small learning rate makes more, and flips thousands of roundings on the way through the layers."""

_WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}
_KEY = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<module>\w+)"
    r"\.lora_(?P<side>[AB])\.weight"
)


_UNSUPPORTED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
)
"""Config fields under which the change of a weight is not scaling * B A, or not everywhere."""
_INITS_THAT_LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


class Adapter(NamedTuple):
    """What validation learnt of an adapter."""

    rank: int
    largest_change: float
    """Over its weights, of the root mean square of scaling * B A."""

    @property
    def is_visible(self) -> bool:
        """Whether a model with it must answer differently from its base."""
        return self.largest_change >= VISIBLE_CHANGE


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    stop: int


def validate_adapter(
    folder: Path, base_config: Mapping[str, Any], *, base_model: str, max_rank: int | None = None
) -> Adapter:
    """What the folder holds, when its adapter fits `base_model`, whose config.json is `base_config`.

    Raises CorruptArtifact naming the file and what is wrong with it, EngineUnavailable (`engine_refused`)
    for a rank above `max_rank`.
    """
    config = _read_config(folder / CONFIG)
    declared = config.get("base_model_name_or_path")
    if declared and declared != base_model:
        raise _corrupt(folder / CONFIG, f"made for the base model '{declared}', not '{base_model}'")
    rank = int(config["r"])
    if max_rank is not None and rank > max_rank:
        raise EngineUnavailable(
            f"The adapter's rank is {rank}, and the inference engine serves up to {max_rank} "
            "(RATCHET_ENGINE_MAX_RANK).",
            code="engine_refused",
        )
    weights = folder / WEIGHTS
    try:
        with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tensors = read_header(data, weights)
            _check_keys_and_shapes(weights, tensors, config, base_config)
            return Adapter(rank, _largest_change(weights, data, tensors, config))
    except (OSError, ValueError) as error:
        raise _corrupt(weights, str(error)) from error


def read_header(data: mmap.mmap, path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file; offsets are checked to tile the file exactly."""
    if len(data) < 8:
        raise _corrupt(path, "shorter than a safetensors header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise _corrupt(path, "its header does not fit the file")
    try:
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        tensors = {
            str(name): Tensor(
                str(entry["dtype"]),
                tuple(int(size) for size in entry["shape"]),
                8 + length + int(entry["data_offsets"][0]),
                8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _corrupt(path, f"its header is not a safetensors header ({error})") from error
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.dtype not in _WIDTHS:
            raise _corrupt(path, f"'{name}' has dtype {tensor.dtype}; expected one of {sorted(_WIDTHS)}")
        size = math.prod(tensor.shape) * _WIDTHS[tensor.dtype]
        if tensor.start != position or tensor.stop - tensor.start != size:
            raise _corrupt(path, f"the data of '{name}' is not where its header says")
        position = tensor.stop
    if position != len(data):
        raise _corrupt(path, f"{len(data)} bytes, but its header describes {position}")
    return tensors


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _corrupt(path, str(error)) from error
    if not isinstance(config, dict):
        raise _corrupt(path, "not a JSON object")
    if config.get("peft_type") != "LORA":
        raise _corrupt(path, f"peft_type is {config.get('peft_type')!r}, not 'LORA'")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise _corrupt(path, f"r is {rank!r}, not a positive whole number")
    if (
        not isinstance(alpha, int | float)
        or isinstance(alpha, bool)
        or not math.isfinite(alpha)
        or alpha <= 0
    ):
        raise _corrupt(path, f"lora_alpha is {alpha!r}, not a positive number")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise _corrupt(path, "target_modules is not a list of names")
    unsupported = [field for field in _UNSUPPORTED if config.get(field)]
    if config.get("init_lora_weights", True) not in _INITS_THAT_LEAVE_THE_BASE:
        unsupported.append("init_lora_weights")
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise _corrupt(path, f"{', '.join(unsupported)} set: engines would ignore or refuse it")
    return config


def _check_keys_and_shapes(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], base_config: Mapping[str, Any]
) -> None:
    sizes = linear_sizes(base_config)
    targets = set(config["target_modules"])
    unknown = targets - sizes.keys()
    if unknown:
        raise _corrupt(path.with_name(CONFIG), f"target modules {sorted(unknown)} are not in the base model")
    layers, rank = int(base_config["num_hidden_layers"]), int(config["r"])
    found = set()
    for name, tensor in tensors.items():
        key = _KEY.fullmatch(name)
        if key is None or key["module"] not in targets:
            raise _corrupt(path, f"'{name}' is not a weight of the target modules")
        if int(key["layer"]) >= layers:
            raise _corrupt(path, f"'{name}': the base model has {layers} layers")
        inputs, outputs = sizes[key["module"]]
        shape = (rank, inputs) if key["side"] == "A" else (outputs, rank)
        if tensor.shape != shape:
            raise _corrupt(
                path, f"'{name}' is {list(tensor.shape)}; r={rank} and the base need {list(shape)}"
            )
        found.add((int(key["layer"]), key["module"], key["side"]))
    for layer in range(layers):
        for module in sorted(targets):
            for side in "AB":
                if (layer, module, side) not in found:
                    raise _corrupt(path, f"lora_{side} of layer {layer}'s {module} is missing")


def linear_sizes(base_config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear module of a Llama-shaped block (Llama, Mistral, Qwen2, Qwen3,
    SmolLM). Raises CorruptArtifact when the config is not one."""
    try:
        hidden = int(base_config["hidden_size"])
        inner = int(base_config["intermediate_size"])
        heads = int(base_config["num_attention_heads"])
        head = int(base_config.get("head_dim") or hidden // heads)
        shared = int(base_config.get("num_key_value_heads") or heads)
        int(base_config["num_hidden_layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptArtifact(f"The base model's config.json lacks what shapes need: {error}.") from error
    return {
        "q_proj": (hidden, heads * head),
        "k_proj": (hidden, shared * head),
        "v_proj": (hidden, shared * head),
        "o_proj": (heads * head, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def _largest_change(
    path: Path, data: mmap.mmap, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> float:
    """See `Adapter`. Raises CorruptArtifact for values that are not finite."""
    rank = int(config["r"])
    scaling = float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    largest = 0.0
    for name in tensors:
        if ".lora_A." not in name:
            continue
        down, up = (_values(path, data, tensors, one) for one in (name, name.replace(".lora_A.", ".lora_B.")))
        # The sum of squares of B A without forming it: trace of (B'B)(A A').
        squares = float(np.sum((up.T @ up) * (down @ down.T)))
        change = abs(scaling) * math.sqrt(max(0.0, squares) / (up.shape[0] * down.shape[1]))
        largest = max(largest, change)
    return largest


def _values(path: Path, data: mmap.mmap, tensors: Mapping[str, Tensor], name: str) -> NDArray[np.float64]:
    tensor = tensors[name]
    content = data[
        tensor.start : tensor.stop
    ]  # a copy: arrays over the map itself would keep it from closing
    if tensor.dtype == "BF16":
        # numpy has no bfloat16: it is the upper half of a float32.
        values = (np.frombuffer(content, dtype="<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(content, dtype="<f2" if tensor.dtype == "F16" else "<f4")
    if not bool(np.all(np.isfinite(values))):
        raise _corrupt(path, f"'{name}' holds NaN or infinity")
    return values.reshape(tensor.shape).astype(np.float64)


def _corrupt(path: Path, what: str) -> CorruptArtifact:
    return CorruptArtifact(f"{path}: {what}.", code="corrupt_artifact")
