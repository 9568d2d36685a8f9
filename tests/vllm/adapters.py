"""Versions of the small real model, made without training."""

import json
import mmap
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from serving.validation import read_header

BASE = "smollm2-135m-instruct"
LAYERS = 30
SIZES = {
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}
"""(inputs, outputs) of SmolLM2-135M-Instruct's linear modules."""
MODULES = ("q_proj", "v_proj", "down_proj")


def tensor_name(layer: int, module: str, side: str) -> str:
    block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"base_model.model.model.layers.{layer}.{block}.{module}.lora_{side}.weight"


def weights(seed: int, rank: int = 8, modules: Sequence[str] = MODULES) -> dict[str, np.ndarray]:
    """Noise that changes the model's answers plainly and differs for every seed."""
    dice = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module in modules:
            inputs, outputs = SIZES[module]
            down = dice.standard_normal((rank, inputs)) / inputs**0.5
            up = dice.standard_normal((outputs, rank)) * 0.05
            tensors[tensor_name(layer, module, "A")] = down.astype(np.float32)
            tensors[tensor_name(layer, module, "B")] = up.astype(np.float32)
    return tensors


def write(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": list(MODULES),
        "bias": "none",
        "base_model_name_or_path": BASE,
    }
    (folder / "adapter_config.json").write_text(json.dumps({**body, **config}))
    overwrite(folder, tensors)
    return folder


def overwrite(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Other weights in one step, so that no reader sees half of them."""
    save_file(dict(tensors), folder / "new.safetensors")
    (folder / "new.safetensors").rename(folder / "adapter_model.safetensors")


def write_whole(folder: Path, base: Path) -> Path:
    """The whole model with half of its last norm at zero, which changes every answer plainly."""
    shutil.copytree(base, folder)
    weights_file = folder / "model.safetensors"
    with weights_file.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        norm = read_header(data, weights_file)["model.norm.weight"]
        middle = (norm.start + norm.stop) // 2
        data[middle : norm.stop] = bytes(norm.stop - middle)
    return folder
