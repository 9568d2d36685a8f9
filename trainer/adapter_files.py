"""An adapter's folder: PEFT's layout, safetensors."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from domain.errors import TrainingRefused

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_UNREAD = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
"""Settings that change the product and that the trainer's layer does not have."""


@dataclass(frozen=True)
class SavedAdapter:
    """Per layer the product is alpha / rank * B A."""

    rank: int
    alpha: float
    matrices: dict[str, tuple[Tensor, Tensor]]
    """(A [rank, in], B [out, rank]) by the layer's path in the base model."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


def is_adapter(folder: Path) -> bool:
    """Whether a version's folder holds an adapter rather than a full checkpoint."""
    return (folder / CONFIG).exists()


def read_adapter(folder: Path) -> SavedAdapter:
    """Raises TrainingRefused for one whose product is more than alpha / rank * B A."""
    config = json.loads((folder / CONFIG).read_text())
    unread = [name for name in _UNREAD if config.get(name)]
    if unread:
        raise TrainingRefused(
            f"The parent adapter sets {', '.join(unread)}, which the trainer does not reproduce.",
            code="parent_adapter_unsupported",
        )
    saved = load_file(folder / WEIGHTS)
    ends = (".lora_A.weight", ".lora_B.weight")
    layers = sorted({name.removesuffix(end) for name in saved for end in ends if name.endswith(end)})
    strange = saved.keys() - {f"{layer}{end}" for layer in layers for end in ends}
    lacking = {f"{layer}{end}" for layer in layers for end in ends} - saved.keys()
    if strange or lacking:
        raise TrainingRefused(
            f"The parent adapter's {sorted(strange | lacking)[0]!r} is not one of a pair of A and B.",
            code="parent_adapter_unsupported",
        )
    return SavedAdapter(
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        matrices={
            layer.removeprefix("base_model.model."): (saved[layer + ends[0]], saved[layer + ends[1]])
            for layer in layers
        },
    )


def write_adapter(folder: Path, adapter: SavedAdapter, settings: Mapping[str, Any], base_model: str) -> None:
    """`settings` is PEFT's own description of the adapter, of which rank, alpha and layers are ours."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer, pair in adapter.matrices.items():
        for side, tensor in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{layer}.lora_{side}.weight"] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        **settings,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        # peft lists whole paths where a model has few layers; engines look layers up by their last part.
        "target_modules": sorted({layer.rpartition(".")[2] for layer in adapter.matrices}),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    for name in (WEIGHTS, CONFIG):
        with (folder / name).open("rb") as written:
            os.fsync(written.fileno())
