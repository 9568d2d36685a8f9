"""The API over a real SQLite database and real version files; engines are added where a test needs one."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, models, pre_tokenizers

from api.app import create_app
from domain.settings import Settings
from tests.conftest_databases import NewDatabase

WINDOW = 64
"""Context window of the tiny base model, tokens; its tokens are words."""
PARAMETERS = 6
"""Elements in its weights file."""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "max_position_embeddings": WINDOW,
    "vocab_size": 3,
}
SKILL = {"name": "route", "grader": {"type": "exact"}, "holdout_fraction": 0}


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in Hugging Face layout whose tokenizer makes one token of each word."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    return folder


@pytest.fixture
def settings(tmp_path: Path, new_sqlite: NewDatabase) -> Settings:
    """A home of the test's own, without broker and engine."""
    return Settings(home=tmp_path, cache_dir=tmp_path / "cache", database_url=new_sqlite(True))


@pytest.fixture
def api(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    # No engine is there that could serve what an alias is moved to.
    monkeypatch.setattr("api.rollback.SERVING_SECONDS", 0.0)
    with TestClient(create_app(settings), base_url="http://127.0.0.1", follow_redirects=False) as client:
        yield client


@pytest.fixture
def assistant(api: TestClient, base_folder: Path) -> dict[str, Any]:
    """`support`, with the skill `route` that holds nothing out."""
    created = api.post("/v1/assistants", json={"name": "support", "base_model": str(base_folder)})
    assert created.status_code == 201, created.text
    assert api.post("/v1/assistants/support/skills", json=SKILL).status_code == 201
    body: dict[str, Any] = created.json()
    return body
