"""What may not reach an engine as a full version; folders written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from domain.errors import CorruptArtifact
from serving.checkpoint_validation import INDEX, validate_checkpoint

CONFIG = {"hidden_size": 2, "tie_word_embeddings": True}


def weights(value: float = 0.5) -> dict[str, np.ndarray]:
    return {
        "model.embed_tokens.weight": np.full((4, 2), value, dtype=np.float32),
        "model.norm.weight": np.full(2, value, dtype=np.float32),
    }


def write(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """With the tied head written out, as some models on the hub have it."""
    return write(tmp_path / "base", {**weights(), "lm_head.weight": weights()["model.embed_tokens.weight"]})


@pytest.fixture
def version(tmp_path: Path) -> Path:
    return write(tmp_path / "ver_1", weights(0.75))


def test_other_values_alone_are_fine(base: Path, version: Path) -> None:
    (version / "manifest.json").write_text("{}")
    (base / "model.safetensors.index.json.bak").write_text("not a file that an engine reads")
    assert validate_checkpoint(version, base) == version


def test_the_head_is_missing_only_where_it_is_tied(tmp_path: Path) -> None:
    head = {"lm_head.weight": np.ones((4, 2), dtype=np.float32)}
    base = write(tmp_path / "base", {**weights(), **head}, tie_word_embeddings=False)
    version = write(tmp_path / "ver_1", weights(), tie_word_embeddings=False)
    with pytest.raises(CorruptArtifact, match=r"'lm_head.weight' is missing"):
        validate_checkpoint(version, base)


def _replace(**tensors: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: save_file(
        {**weights(), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}},
        folder / "model.safetensors",
    )


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _drop(folder: Path) -> None:
    tensors = weights()
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (_cut, "its header describes"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"no model\*.safetensors"),
    "a missing tensor": (_drop, r"'model.norm.weight' is missing"),
    "a surplus tensor": (_replace(extra=np.ones(2, dtype=np.float32)), "has no 'extra'"),
    "another shape": (
        _replace(model__norm__weight=np.ones(3, dtype=np.float32)),
        r"'model.norm.weight' is \[3\], in the base model \[2\]",
    ),
    "NaN": (
        _replace(model__norm__weight=np.array([1, np.nan], dtype=np.float32)),
        "'model.norm.weight' holds NaN",
    ),
    "integers": (_replace(model__norm__weight=np.ones(2, dtype=np.int32)), "has dtype I32"),
    "another config": (lambda folder: (folder / "config.json").write_text("{}"), "config.json: differs"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "another template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ secret }}"),
        "chat_template.jinja: differs",
    ),
    "an adapter's config": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "adapter_config.json: not a file of the base",
    ),
    "an index that lies": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'),
        "does not say where",
    ),
    "a tensor twice": (
        lambda folder: save_file(weights(), folder / "model-2.safetensors"),
        "stands in",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_anything_else_is_refused_by_name(base: Path, version: Path, damage: str) -> None:
    spoil, told = DAMAGE[damage]
    spoil(version)
    with pytest.raises(CorruptArtifact, match=told):
        validate_checkpoint(version, base)


def test_weights_in_several_files_need_their_index(base: Path, version: Path) -> None:
    one, other = weights().items()
    save_file(dict([one]), version / "model.safetensors")
    save_file(dict([other]), version / "model-2.safetensors")
    with pytest.raises(CorruptArtifact, match=r"index.json: missing"):
        validate_checkpoint(version, base)
    where = {one[0]: "model.safetensors", other[0]: "model-2.safetensors"}
    (version / INDEX).write_text(json.dumps({"weight_map": where}))
    assert validate_checkpoint(version, base) == version
