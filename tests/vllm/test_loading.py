"""Which adapters vLLM takes, and which it refuses: what it takes silently, Ratchet must refuse itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifacts import base_models
from domain.errors import CorruptArtifact
from domain.settings import Settings
from serving.validation import validate_adapter
from tests.vllm.adapters import BASE, tensor_name, weights, write
from tests.vllm.server import Server

Q0 = tensor_name(0, "q_proj", "A")


def refused_by_ratchet(folder: Path) -> bool:
    base = base_models.resolve(BASE, Settings().cache_dir).path
    config = json.loads((base / "config.json").read_bytes())
    try:
        validate_adapter(folder, config, base_model=BASE)
    except CorruptArtifact:
        return True
    return False


def other_rank(folder: Path) -> Path:
    return write(folder, weights(1), r=16)


def smaller_shapes(folder: Path) -> Path:
    tensors = weights(1)
    for layer in range(30):
        name = tensor_name(layer, "down_proj", "B")
        tensors[name] = tensors[name][:192]
    return write(folder, tensors)


def not_numbers(folder: Path) -> Path:
    tensors = weights(1)
    tensors[Q0][:] = np.nan
    return write(folder, tensors)


def another_base(folder: Path) -> Path:
    return write(folder, weights(1), base_model_name_or_path="meta-llama/Llama-3-8B")


def layers_missing(folder: Path) -> Path:
    return write(folder, {name: value for name, value in weights(1).items() if ".layers.7." not in name})


def layer_99(folder: Path) -> Path:
    tensors = weights(1)
    tensors[tensor_name(99, "q_proj", "A")] = tensors[Q0]
    tensors[tensor_name(99, "q_proj", "B")] = tensors[tensor_name(0, "q_proj", "B")]
    return write(folder, tensors)


SILENT = [other_rank, smaller_shapes, not_numbers, another_base, layers_missing, layer_99]


@pytest.mark.parametrize("make", SILENT, ids=lambda make: make.__name__)
def test_what_vllm_takes_silently_ratchet_refuses(
    server: Server, tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    folder = make(tmp_path / "broken")
    reply = server.load(f"silent-{make.__name__}", folder)
    server.unload(f"silent-{make.__name__}")
    assert reply.status_code == 200, f"vLLM refuses it now ({reply.text}): say so in docs/serving.md"
    assert refused_by_ratchet(folder)


def test_a_wrong_alpha_is_taken_silently_and_only_a_hash_can_tell(server: Server, tmp_path: Path) -> None:
    folder = write(tmp_path / "alpha", weights(1), lora_alpha=1000)
    assert server.load("alpha", folder).status_code == 200
    server.unload("alpha")
    assert not refused_by_ratchet(folder)


def test_weights_that_are_not_numbers_fail_at_the_request(server: Server, tmp_path: Path) -> None:
    server.load("nan", not_numbers(tmp_path / "nan"))
    assert server.complete("nan").status_code != 200
    server.unload("nan")
    assert server.answers()


def rank_above_the_limit(folder: Path) -> None:
    write(folder, weights(1, rank=32), r=32)


def truncated(folder: Path) -> None:
    file = write(folder, weights(1)) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


def garbage(folder: Path) -> None:
    (write(folder, weights(1)) / "adapter_model.safetensors").write_bytes(b"garbage")


def bad_json(folder: Path) -> None:
    (write(folder, weights(1)) / "adapter_config.json").write_text("{")


def unknown_modules(folder: Path) -> None:
    tensors = {name.replace("q_proj", "wing"): value for name, value in weights(1).items()}
    write(folder, tensors, target_modules=["wing", "v_proj", "down_proj"])


def dora(folder: Path) -> None:
    write(folder, weights(1), use_dora=True)


def no_config(folder: Path) -> None:
    (write(folder, weights(1)) / "adapter_config.json").unlink()


def no_folder(folder: Path) -> None:
    assert not folder.exists()


@pytest.mark.parametrize(
    ("make", "status"),
    [
        (rank_above_the_limit, 500),
        (truncated, 500),
        (garbage, 500),
        (bad_json, 500),
        (unknown_modules, 500),
        (dora, 500),
        (no_config, 404),
        (no_folder, 404),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_vllm_refuses_leaves_it_and_its_adapters_intact(
    server: Server, tmp_path: Path, adapter: Path, make: Callable[[Path], Any], status: int
) -> None:
    assert server.load("intact", adapter).status_code == 200
    before = server.score("intact")
    make(tmp_path / "broken")
    assert server.load("broken", tmp_path / "broken").status_code == status
    assert "broken" not in [card["id"] for card in server.http.get("/v1/models").json()["data"]]
    assert server.score("intact") == pytest.approx(before, abs=0.1)
    server.unload("intact")


def test_a_name_is_taken_once(server: Server, adapter: Path, other: Path) -> None:
    assert server.load(BASE, adapter).status_code == 400
    assert server.load("taken", adapter).status_code == 200
    assert server.load("taken", other).status_code == 400
    server.unload("taken")


def test_a_model_name_is_no_path(server: Server, adapter: Path) -> None:
    for model in (str(adapter), f"../{adapter.name}"):
        assert server.complete(model).status_code == 404
