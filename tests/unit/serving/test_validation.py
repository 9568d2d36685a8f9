"""Every way that vLLM would accept a wrong adapter silently is refused here."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domain.errors import CorruptArtifact, EngineUnavailable
from serving.validation import linear_sizes, validate_adapter

BASE = "small"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_a_whole_adapter_is_valid(tmp_path: Path, adapter: Any, base_config: Any) -> None:
    assert validate_adapter(adapter(tmp_path / "a"), base_config, base_model=BASE) == (2, 0.0)


def test_sizes_of_the_small_real_model() -> None:
    config = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "head_dim": 64,
    }
    assert linear_sizes(config)["k_proj"] == (576, 192)
    assert linear_sizes(config)["down_proj"] == (1536, 576)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4}, "r=4 and the base need"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"target_modules": ["q_proj", "wing"]}, "'wing'"),
        ({"target_modules": ["q_proj"]}, "not a weight of the target modules"),
        ({"target_modules": "all-linear"}, "not a list"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "k_proj"]}, "layer 0's k_proj is missing"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"base_model_name_or_path": "another"}, "made for the base model 'another', not 'small'"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_a_config_at_odds_is_refused(
    tmp_path: Path, adapter: Any, base_config: Any, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorruptArtifact, match=message):
        validate_adapter(adapter(tmp_path / "a", **config), base_config, base_model=BASE)


def test_a_missing_half_is_refused(tmp_path: Path, adapter: Any, tensors: Any, base_config: Any) -> None:
    weights = tensors()
    del weights[Q0.replace("lora_A", "lora_B")]
    with pytest.raises(CorruptArtifact, match="lora_B of layer 0's q_proj is missing"):
        validate_adapter(adapter(tmp_path / "a", weights), base_config, base_model=BASE)


def test_a_layer_beyond_the_base_is_refused(
    tmp_path: Path, adapter: Any, tensors: Any, base_config: Any
) -> None:
    weights = tensors()
    weights[Q0.replace("layers.0", "layers.99")] = weights[Q0]
    with pytest.raises(CorruptArtifact, match="the base model has 2 layers"):
        validate_adapter(adapter(tmp_path / "a", weights), base_config, base_model=BASE)


def test_another_bases_shapes_are_refused(tmp_path: Path, adapter: Any, base_config: Any) -> None:
    base_config["hidden_size"] = 16
    with pytest.raises(CorruptArtifact, match="the base need"):
        validate_adapter(adapter(tmp_path / "a"), base_config, base_model=BASE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_weights_that_are_not_numbers_are_refused(
    tmp_path: Path, adapter: Any, tensors: Any, base_config: Any, kind: Any, bad: float
) -> None:
    weights = {name: value.astype(kind) for name, value in tensors().items()}
    validate_adapter(adapter(tmp_path / "good", weights), base_config, base_model=BASE)
    weights[Q0][1, 3] = bad
    with pytest.raises(CorruptArtifact, match="NaN or infinity"):
        validate_adapter(adapter(tmp_path / "bad", weights), base_config, base_model=BASE)


def write_bf16(folder: Path, tensors: dict[str, Any], special: int | None) -> None:
    """bfloat16 is the upper half of float32; `special` are the bits of one planted element."""
    header: dict[str, Any] = {}
    body = b""
    for name, value in tensors.items():
        bits = (value.view(np.uint32) >> 16).astype("<u2")
        if special is not None and name == Q0:
            bits[0, 0] = special
        header[name] = {
            "dtype": "BF16",
            "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + bits.nbytes],
        }
        body += bits.tobytes()
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize(
    ("bits", "good"), [(None, True), (0x7F7F, True), (0x7F80, False), (0xFF80, False), (0x7FC0, False)]
)
def test_bfloat16_is_read(
    tmp_path: Path, adapter: Any, tensors: Any, base_config: Any, bits: int | None, good: bool
) -> None:
    folder = adapter(tmp_path / "a")
    write_bf16(folder, tensors(), bits)
    if good:
        validate_adapter(folder, base_config, base_model=BASE)
    else:
        with pytest.raises(CorruptArtifact, match="NaN or infinity"):
            validate_adapter(folder, base_config, base_model=BASE)


def test_torn_and_foreign_files_are_refused(tmp_path: Path, adapter: Any, base_config: Any) -> None:
    weights = adapter(tmp_path / "a") / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-4], whole[:40], whole + b"tail", b"", b"junk", struct.pack("<Q", 5) + b"hello"):
        weights.write_bytes(content)
        with pytest.raises(CorruptArtifact, match=r"adapter_model\.safetensors"):
            validate_adapter(tmp_path / "a", base_config, base_model=BASE)
    weights.write_bytes(whole)
    validate_adapter(tmp_path / "a", base_config, base_model=BASE)
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(CorruptArtifact, match=r"adapter_config\.json"):
        validate_adapter(tmp_path / "a", base_config, base_model=BASE)


def test_a_rank_above_the_engines_is_refused_by_its_setting(
    tmp_path: Path, adapter: Any, base_config: Any
) -> None:
    folder = adapter(tmp_path / "a", base_model_name_or_path=BASE)
    assert validate_adapter(folder, base_config, base_model=BASE, max_rank=2).rank == 2
    with pytest.raises(EngineUnavailable, match=r"rank is 2.*up to 1 \(RATCHET_ENGINE_MAX_RANK\)") as refused:
        validate_adapter(folder, base_config, base_model=BASE, max_rank=1)
    assert refused.value.code == "engine_refused"


@pytest.mark.parametrize(("config", "scaling"), [({}, 2.0), ({"use_rslora": True}, 4 / 2**0.5)])
def test_the_largest_change_is_that_of_the_product(
    tmp_path: Path, adapter: Any, tensors: Any, base_config: Any, config: dict[str, Any], scaling: float
) -> None:
    rng = np.random.default_rng(1)
    weights = {name: rng.standard_normal(value.shape).astype("<f4") for name, value in tensors().items()}
    products = [
        scaling * weights[name.replace("lora_A", "lora_B")] @ weights[name]
        for name in weights
        if "lora_A" in name
    ]
    largest = max(float(np.sqrt(np.mean(np.square(product)))) for product in products)
    found = validate_adapter(adapter(tmp_path / "a", weights, **config), base_config, base_model=BASE)
    assert found.largest_change == pytest.approx(largest, rel=1e-5)
    assert found.is_visible
    tiny = {name: value * np.float32(1e-8 if "lora_B" in name else 1) for name, value in weights.items()}
    folder = adapter(tmp_path / "b", tiny, **config)
    assert not validate_adapter(folder, base_config, base_model=BASE).is_visible
