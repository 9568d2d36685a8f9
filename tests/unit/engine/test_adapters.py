"""Every way in which an adapter may be wrong is refused; vLLM accepts most of these silently."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.adapters import AdapterRegistry, read_adapter
from engine.errors import BadRequest, InvalidAdapter, NotFound
from engine.model import BaseModel

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def folder(adapter_dirs: list[Path], tmp_path: Path) -> Path:
    """A copy of a good adapter: rank 4, alpha 8, all linear layers."""
    return Path(shutil.copytree(adapter_dirs[0], tmp_path / "adapter"))


def set_config(folder: Path, **fields: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_good_adapter(base: BaseModel, folder: Path) -> None:
    adapter = read_adapter("good", folder, base.module)
    stored = load_file(folder / "adapter_model.safetensors")
    # 2 layers x (q k v o gate up down)
    assert len(adapter.pairs) == 14
    pair = adapter.pairs["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(pair.down, stored[FIRST])
    # alpha / r = 8 / 4
    torch.testing.assert_close(pair.up, 2 * stored[FIRST.replace("lora_A", "lora_B")])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"r": 8}, r"has shape \(4, 128\), config and base model ask for \(8, 128\)"),
        ({"r": 0}, "r"),
        ({"r": 100000}, "r is 100000"),
        ({"r": "four"}, "r"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"peft_type": "IA3"}, "peft_type|cannot be read"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"]}, "belong to no targeted layer"),
        ({"target_modules": ["nothing"]}, "name no layer"),
        ({"layers_to_transform": [0], "target_modules": ALL}, "belong to no targeted layer"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_config_that_disagrees(base: BaseModel, folder: Path, fields: dict[str, object], told: str) -> None:
    set_config(folder, **fields)
    with pytest.raises(InvalidAdapter, match=told) as refused:
        read_adapter("bad", folder, base.module)
    assert refused.value.param == "lora_path"


def spoil_value(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[FIRST][0, 0] = value

    return spoil


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(FIRST), "1 tensors are missing, first .*layers.0.self_attn.q_proj.lora_A"),
        (lambda t: t.update({FIRST.replace("layers.0", "layers.99"): t[FIRST].clone()}), "layers.99"),
        (lambda t: t.update({FIRST: t[FIRST][:, :32].contiguous()}), r"has shape \(4, 32\)"),
        (lambda t: t.update({FIRST: t[FIRST][:2].contiguous()}), r"has shape \(2, 64\)"),
        (lambda t: t.update({FIRST: t[FIRST].int()}), "not floating point"),
        (spoil_value(float("nan")), "not finite"),
        (spoil_value(float("inf")), "not finite"),
        (lambda t: t.clear(), "28 tensors are missing"),
    ],
)
def test_weights_that_do_not_fit(
    base: BaseModel, folder: Path, change: Callable[[dict[str, torch.Tensor]], object], told: str
) -> None:
    change_tensors(folder, change)
    with pytest.raises(InvalidAdapter, match=told):
        read_adapter("bad", folder, base.module)


def test_adapter_of_another_base(base: BaseModel, folder: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            wide = (tensor.shape[0], 2 * tensor.shape[1]) if "lora_A" in name else (2 * tensor.shape[0], 4)
            tensors[name] = torch.zeros(wide)

    change_tensors(folder, widen)
    with pytest.raises(InvalidAdapter, match="base model ask for"):
        read_adapter("bad", folder, base.module)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64])
def test_torn_files(base: BaseModel, folder: Path, content: bytes) -> None:
    weights = folder / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(content)
    with pytest.raises(InvalidAdapter, match="cannot be read"):
        read_adapter("bad", folder, base.module)
    weights.write_bytes(good[:-5])
    with pytest.raises(InvalidAdapter, match="cannot be read"):
        read_adapter("bad", folder, base.module)
    weights.write_bytes(good)
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(InvalidAdapter, match="cannot be read"):
        read_adapter("bad", folder, base.module)


@pytest.mark.parametrize("gone", ["adapter_config.json", "adapter_model.safetensors", ""])
def test_missing_files(base: BaseModel, folder: Path, gone: str) -> None:
    if gone:
        (folder / gone).unlink()
    else:
        shutil.rmtree(folder)
    with pytest.raises(NotFound):
        read_adapter("gone", folder, base.module)


def test_names(base: BaseModel, adapter_dirs: list[Path]) -> None:
    registry = AdapterRegistry("tiny")
    registry.load("one", adapter_dirs[0], base.module)
    for taken in ("one", "tiny"):
        with pytest.raises(BadRequest, match="already been loaded"):
            registry.load(taken, adapter_dirs[1], base.module)
    found = registry.find("one")
    assert found is not None
    assert found.rank == 4
    assert registry.find("tiny") is None
    registry.unload("one")
    for verb in (registry.find, registry.unload):
        with pytest.raises(NotFound):
            verb("one")
    registry.load("one", adapter_dirs[1], base.module)
    assert [one.rank for one in registry.list()] == [8]


def test_refused_name_is_free_again(base: BaseModel, folder: Path, adapter_dirs: list[Path]) -> None:
    registry = AdapterRegistry("tiny")
    with pytest.raises(NotFound):
        registry.load("one", folder / "nowhere", base.module)
    registry.load("one", adapter_dirs[0], base.module)
    assert len(registry.list()) == 1
