"""Text while tokens come, and where tokens begin in their text."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import BatchEncoding, PreTrainedTokenizerFast

from engine.errors import BadRequest, ContextExceeded
from engine.model import BaseModel
from engine.prompts import TokenTexts
from engine.text import RunningText


def ids_of(base: BaseModel, text: str) -> list[int]:
    return list(base.tokenizer(text).input_ids)


def streamed(base: BaseModel, text: str, *stop: str) -> tuple[list[str], RunningText]:
    """What a stream would send after each token, and at the end."""
    running = RunningText(base.tokenizer, ids_of(base, "prompt "), stop)
    sent = []
    for token in ids_of(base, text):
        running.add(token)
        if running.stopped_by is not None:
            break
        sent.append(running.take(final=False))
    running.finish()
    sent.append(running.take(final=True))
    return sent, running


def test_characters_come_whole(base: BaseModel) -> None:
    sent, running = streamed(base, "né 😀!")
    assert sent == ["n", "", "é", " ", "", "", "", "😀", "!", ""]
    assert running.text == "né 😀!"


def test_incomplete_character_is_shown_at_the_end(base: BaseModel) -> None:
    running = RunningText(base.tokenizer, [], ())
    running.add(ids_of(base, "é")[0])
    assert running.take(final=False) == ""
    running.finish()
    assert running.take(final=True) == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_have_no_text(base: BaseModel) -> None:
    running = RunningText(base.tokenizer, [], ())
    for token in [*ids_of(base, "a"), *base.stop_ids, *ids_of(base, "b")]:
        running.add(token)
    assert running.text == "ab"


def test_stop_string_is_cut_off_and_never_sent(base: BaseModel) -> None:
    sent, running = streamed(base, "one two STOP three", "STOP", "never")
    assert "".join(sent) == running.text == "one two "
    assert running.stopped_by == "STOP"


def test_beginning_of_a_stop_string_is_sent_once_it_is_none(base: BaseModel) -> None:
    sent, running = streamed(base, "aSTxb", "STOP")
    assert "".join(sent) == "aSTxb"
    # three characters may still become the stop string
    assert sent[:4] == ["", "", "", "a"]
    assert running.stopped_by is None


def test_earliest_stop_string_wins(base: BaseModel) -> None:
    _, running = streamed(base, "xthey", "hey", "the")
    assert (running.stopped_by, running.text) == ("the", "x")


@pytest.mark.parametrize("text", ["the cat", "né 😀 the end", "a\n\nb", " x", "日本語 the"])
def test_offsets_of_text_and_of_its_ids_agree(base: BaseModel, text: str) -> None:
    texts = TokenTexts(base.tokenizer, base.module.config.vocab_size, base.max_length)
    by_text = texts.prompt_of_text(text)
    by_ids = texts.prompt_of_ids(by_text.ids)
    assert by_ids.text == text
    assert by_text.offsets == by_ids.offsets


class Tokenizer(PreTrainedTokenizerFast):
    """Notes how many characters or ids it is given."""

    given: ClassVar[list[int]] = []

    def __call__(self, text: str, *args: Any, **kwargs: Any) -> BatchEncoding:  # type: ignore[override]
        self.given.append(len(text))
        return super().__call__(text, *args, **kwargs)

    def decode(self, token_ids: list[int], *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        self.given.append(len(token_ids))
        return str(super().decode(token_ids, *args, **kwargs))


def test_what_no_window_can_hold_is_refused_unread(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    texts = TokenTexts(tokenizer, 260, window=20)
    # The longest spelling is that of <|im_start|>: 20 tokens have at most 20 * 12 characters.
    most = "<|im_start|>" * 20
    tokenizer.given.clear()
    for spelled, count in ((most + "x", 241), ("x" * 1_000_000, 1_000_000)):
        told = f"context length is 20 tokens. However, your request has {count} characters, .* at most 240"
        with pytest.raises(ContextExceeded, match=told) as refused:
            texts.prompt_of_text(spelled)
        assert refused.value.param == "prompt"
        with pytest.raises(ContextExceeded, match=told) as refused:
            texts.prompt_of_chat([{"role": "user", "content": spelled}], add_generation_prompt=True)
        assert refused.value.param == "messages"
    with pytest.raises(ContextExceeded, match="your request has 21 input tokens"):
        texts.prompt_of_ids([1] * 21)
    assert tokenizer.given == []
    assert len(texts.prompt_of_text(most).ids) == 20
    assert texts.prompt_of_ids([1] * 20).ids == [1] * 20
    with pytest.raises(ContextExceeded, match="your request has 21 input tokens"):
        texts.prompt_of_text("x" * 21)


def test_offsets_by_hand(base: BaseModel) -> None:
    texts = TokenTexts(base.tokenizer, base.module.config.vocab_size, base.max_length)
    prompt = texts.prompt_of_text("é the")
    # two bytes of é, blank, "the"
    assert [texts.of(token) for token in prompt.ids[2:]] == [" ", "the"]
    assert prompt.offsets == [0, 0, 1, 2]


def test_ids_outside_the_vocabulary(base: BaseModel) -> None:
    texts = TokenTexts(base.tokenizer, base.module.config.vocab_size, base.max_length)
    size = base.module.config.vocab_size
    for bad in (-1, size):
        with pytest.raises(BadRequest, match=f"Token id {bad} is out of vocabulary"):
            texts.prompt_of_ids([1, bad])
