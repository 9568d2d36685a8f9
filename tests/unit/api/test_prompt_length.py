"""Token counts against the window, with a tokenizer whose tokens are words."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from api.prompt_length import PromptLengths
from domain.demonstration import Demonstration, Message
from domain.errors import DemonstrationsRejected, UnknownBaseModel

WINDOW = 8


@pytest.fixture
def base_model(tmp_path: Path) -> str:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": WINDOW}))
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # A tokenizer that truncates by its own configuration must not hide the length.
    words.enable_truncation(4)
    words.save(str(folder / "tokenizer.json"))
    return str(folder)


def demonstration(words: int, response: str = "yes") -> Demonstration:
    messages = [
        Message(role="system", content="be brief"),
        Message(role="user", content=" ".join(["long"] * words)),
    ]
    return Demonstration(messages=messages, response=response, answer=response)


def test_what_leaves_no_room_is_refused_by_line(tmp_path: Path, base_model: str) -> None:
    lengths = PromptLengths(tmp_path)
    # 2 of the system message + words + 1 of the response: 7 fit the window of 8, 8 fill it.
    lengths.require_fit(base_model, WINDOW, [(1, demonstration(4))])
    with pytest.raises(DemonstrationsRejected) as refused:
        lengths.require_fit(
            base_model, WINDOW, [(1, demonstration(4)), (5, demonstration(5)), (9, demonstration(9))]
        )
    assert [line.line for line in refused.value.lines] == [5, 9]
    assert refused.value.param == "line 5"
    assert "prompt (7 tokens) and response (1 tokens)" in refused.value.lines[0].message
    assert "window of 8 tokens" in refused.value.lines[0].message


def test_a_long_response_counts_too(tmp_path: Path, base_model: str) -> None:
    with pytest.raises(DemonstrationsRejected):
        PromptLengths(tmp_path).require_fit(base_model, WINDOW, [(1, demonstration(1, response="no " * 9))])


def test_short_texts_need_no_tokenizer(tmp_path: Path) -> None:
    short = Demonstration(messages=[Message(role="user", content="hi")], response="a", answer="a")
    PromptLengths(tmp_path).require_fit("/nowhere", WINDOW, [(1, short)])


def test_a_tokenizer_that_cannot_be_read_names_the_base_model(tmp_path: Path, base_model: str) -> None:
    (Path(base_model) / "tokenizer.json").write_text("{}")
    with pytest.raises(UnknownBaseModel) as refused:
        PromptLengths(tmp_path).tokenizer(base_model)
    assert refused.value.param == "base_model"
