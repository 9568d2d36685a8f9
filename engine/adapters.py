"""Adapters by name: read from a folder in PEFT layout, checked against the base, then served.

Nothing is taken on trust: a config that disagrees with the tensors, a layer missing or unknown, a
wrong shape or a value that is not finite would otherwise change answers silently.
"""

import json
import math
import threading
import time
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from engine.errors import BadRequest, InvalidAdapter, NotFound
from engine.lora import Adapter, LoraPair, target_layers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_RANK = 512
_PREFIX = "base_model.model."
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
"""Config fields under which the change of a layer is not scaling * B A."""
_INITS_THAT_LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


def read_adapter(name: str, folder: Path, model: PreTrainedModel) -> Adapter:
    """Load and validate an adapter for `model`; its weights take the model's dtype and device.

    Raises NotFound when the folder or a file is missing, InvalidAdapter when it does not fit the base.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise NotFound(f"No adapter found for {name}: there is no {folder / CONFIG_FILE}", param="lora_path")
    if not (folder / WEIGHTS_FILE).is_file():
        raise NotFound(f"No adapter found for {name}: there is no {folder / WEIGHTS_FILE}", param="lora_path")
    config = _read_config(folder)
    layers = target_layers(model)
    targets = {layer for layer in layers if _is_target(config, layer)}
    if not targets:
        raise _invalid(f"target_modules {config.target_modules} name no layer of the base model")
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    expected = {f"{_PREFIX}{layer}.lora_{side}.weight" for layer in targets for side in "AB"}
    unknown, missing = sorted(tensors.keys() - expected), sorted(expected - tensors.keys())
    if unknown:
        raise _invalid(f"{len(unknown)} tensors belong to no targeted layer, first {unknown[0]}")
    if missing:
        raise _invalid(f"{len(missing)} tensors are missing, first {missing[0]}")
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    pairs = {}
    for layer in sorted(targets):
        linear = layers[layer]
        down = _checked(tensors, f"{layer}.lora_A", (config.r, linear.in_features))
        up = _checked(tensors, f"{layer}.lora_B", (linear.out_features, config.r))
        weight = linear.weight
        pairs[layer] = LoraPair(
            down=down.to(device=weight.device, dtype=weight.dtype),
            up=(up.float() * scaling).to(device=weight.device, dtype=weight.dtype),
        )
    return Adapter(name=name, path=str(folder), rank=config.r, pairs=pairs, created=int(time.time()))


def _invalid(reason: str) -> InvalidAdapter:
    return InvalidAdapter(f"The adapter is invalid: {reason}.", param="lora_path")


def _read_config(folder: Path) -> LoraConfig:
    try:
        declared = json.loads((folder / CONFIG_FILE).read_bytes())
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _invalid(f"{CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(config, LoraConfig) or declared.get("peft_type") != "LORA":
        raise _invalid(f"peft_type is {declared.get('peft_type')!r}, only LORA is served")
    if not isinstance(config.r, int) or not 1 <= config.r <= MAX_RANK:
        raise _invalid(f"r is {config.r!r}, must be 1 to {MAX_RANK}")
    if not isinstance(config.lora_alpha, int | float) or not math.isfinite(config.lora_alpha):
        raise _invalid(f"lora_alpha is {config.lora_alpha!r}")
    for field in _UNSUPPORTED:
        if declared.get(field):
            raise _invalid(f"{field} is not supported")
    if config.bias != "none":
        raise _invalid("bias is not supported")
    if config.init_lora_weights not in _INITS_THAT_LEAVE_THE_BASE:
        raise _invalid(f"init_lora_weights {config.init_lora_weights!r} needs a changed base model")
    return config


def _is_target(config: LoraConfig, layer: str) -> bool:
    if config.target_modules == "all-linear":
        return True
    return bool(check_target_module_exists(config, layer))


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise _invalid(f"{WEIGHTS_FILE} cannot be read: {error}") from error


def _checked(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, int]) -> torch.Tensor:
    tensor = tensors[f"{_PREFIX}{name}.weight"]
    if tuple(tensor.shape) != shape:
        raise _invalid(f"{name} has shape {tuple(tensor.shape)}, config and base model ask for {shape}")
    if not tensor.is_floating_point():
        raise _invalid(f"{name} is {tensor.dtype}, not floating point")
    if not bool(torch.isfinite(tensor).all()):
        raise _invalid(f"{name} has values that are not finite")
    return tensor


class AdapterRegistry:
    """The adapters that requests may name. Thread-safe; a name is never reused while it is loaded."""

    def __init__(self, base_name: str) -> None:
        self._base_name = base_name
        self._lock = threading.Lock()
        self._adapters: dict[str, Adapter] = {}
        self._loading: set[str] = set()

    def list(self) -> list[Adapter]:
        with self._lock:
            return list(self._adapters.values())

    def find(self, name: str) -> Adapter | None:
        """The adapter of that name, None for the base model. Raises NotFound for any other."""
        if name == self._base_name:
            return None
        with self._lock:
            adapter = self._adapters.get(name)
        if adapter is None:
            raise NotFound(f"The model `{name}` does not exist.", param="model")
        return adapter

    def load(self, name: str, folder: Path, model: PreTrainedModel) -> None:
        """Make the adapter in `folder` known as `name`.

        Raises BadRequest when the name is taken, NotFound and InvalidAdapter as `read_adapter` does.
        """
        with self._lock:
            if name == self._base_name or name in self._adapters or name in self._loading:
                raise BadRequest(
                    f"The lora adapter '{name}' has already been loaded.",
                    param="lora_name",
                    type="InvalidUserInput",
                )
            self._loading.add(name)
        try:
            adapter = read_adapter(name, folder, model)
            with self._lock:
                self._adapters[name] = adapter
        finally:
            with self._lock:
                self._loading.discard(name)

    def unload(self, name: str) -> None:
        """Forget the name; requests in flight keep the weights until they end. Raises NotFound."""
        with self._lock:
            if self._adapters.pop(name, None) is None:
                raise NotFound(f"The lora adapter '{name}' cannot be found.", param="lora_name")
