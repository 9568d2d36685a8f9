"""Prompts as tokens, and where in the text each token begins."""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from engine.errors import BadRequest, ContextExceeded

_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Prompt:
    """What a model reads. `offsets[i]` is the character of `text` at which token i begins."""

    ids: list[int]
    text: str
    offsets: list[int]


class TokenTexts:
    """The text of single tokens and of prompts. Thread-safe.

    A prompt beyond the window is refused with ContextExceeded, one far beyond it before it is tokenized:
    8 MB take seconds and more than a gigabyte.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, window: int) -> None:
        """`window` in tokens. Raises ValueError for a tokenizer that cannot tell offsets."""
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} tells no offsets; a tokenizer.json is needed")
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._window = window
        # A vocabulary spells a token with at least as many characters as its text has.
        self._most_characters = window * max(len(spelling) for spelling in tokenizer.get_vocab())
        self._texts: dict[int, str] = {}
        # The first call turns off a truncation that tokenizer.json asks for. No later one changes the
        # tokenizer, which it refuses while another thread uses it.
        tokenizer("")

    def of(self, token: int) -> str:
        """One token as text, special tokens shown; `token_id:N` for one that has no text of its own
        (a piece of a character), so that different tokens never look alike."""
        text = self._alone(token)
        return f"token_id:{token}" if not text or _BROKEN in text else text

    def bytes_of(self, token: int) -> list[int] | None:
        """The token's text in UTF-8, None for a piece of a character."""
        text = self._alone(token)
        return None if _BROKEN in text else list(text.encode())

    def _alone(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = str(self._tokenizer.decode([token]))
        return text

    def prompt_of_text(self, text: str) -> Prompt:
        """Raises ContextExceeded for a text longer than the window."""
        self._require_spellable(text, "prompt")
        encoded = self._tokenizer(text, return_offsets_mapping=True)
        offsets = []
        end_before = 0
        for start, end in encoded["offset_mapping"]:
            # A token begins where the one before ended, unless both are pieces of one character;
            # an added special token has no extent.
            offsets.append(end_before if start == end else min(start, end_before))
            end_before = max(end, end_before)
        ids = list(encoded["input_ids"])
        self._require_room(ids, "prompt")
        return Prompt(ids=ids, text=text, offsets=offsets)

    def prompt_of_ids(self, ids: list[int]) -> Prompt:
        """Raises ContextExceeded for more ids than the window, BadRequest for one outside the vocabulary."""
        self._require_room(ids, "prompt")
        for token in ids:
            if not 0 <= token < self._vocabulary:
                raise BadRequest(
                    f"Token id {token} is out of vocabulary (0 to {self._vocabulary - 1}).", param="prompt"
                )
        return Prompt(ids=ids, text=str(self._tokenizer.decode(ids)), offsets=self.offsets(ids, 0))

    def prompt_of_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> Prompt:
        """Raises BadRequest when the model has no chat template or the template refuses the messages,
        ContextExceeded when they are longer than the window."""
        if not self._tokenizer.chat_template:
            raise BadRequest("The model has no chat template; use /v1/completions.", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except TemplateError as error:
            raise BadRequest(f"The chat template refuses the messages: {error}", param="messages") from error
        self._require_spellable(str(text), "messages")
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        self._require_room(ids, "messages")
        return Prompt(ids=ids, text=str(text), offsets=[])

    def _require_spellable(self, text: str, param: str) -> None:
        if len(text) > self._most_characters:
            told = f"{len(text)} characters, and {self._window} tokens spell at most {self._most_characters}"
            raise ContextExceeded(self._window, told, param=param)

    def _require_room(self, ids: list[int], param: str) -> None:
        if len(ids) > self._window:
            raise ContextExceeded(self._window, f"{len(ids)} input tokens", param=param)

    def offsets(self, ids: list[int], start: int) -> list[int]:
        """Where each token's text begins when they are written one after the other from `start`.

        All pieces of one character begin where the character does.
        """
        offsets = []
        at = start
        pieces: list[int] = []
        for token in ids:
            offsets.append(at)
            text = self._alone(token)
            if not pieces and _BROKEN not in text:
                at += len(text)
                continue
            pieces.append(token)
            joined = str(self._tokenizer.decode(pieces))
            if not joined.endswith(_BROKEN):
                at += len(joined)
                pieces = []
        return offsets
