"""Tokens to text while they come: whole characters only, and stop strings cut off."""

from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 6
"""Prompt tokens decoded along, because some tokenizers treat a text's first token differently."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class RunningText:
    """The text of one sequence's output."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: tuple[str, ...]
    ) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT_TOKENS:])
        self._decoded_from = 0
        self._decoded_to = len(self._ids)
        self._stop = stop
        self._held_back = max((len(text) for text in stop), default=1) - 1
        self._sent = 0
        self.text = ""
        self.stopped_by: str | None = None

    def add(self, token: int) -> None:
        """Append a token. Sets `stopped_by` and cuts the text when a stop string is complete."""
        self._ids.append(token)
        self._extend(whole=False)

    def finish(self) -> None:
        """No more tokens come: an incomplete character is shown as what it is."""
        if self.stopped_by is None:
            self._extend(whole=True)

    def take(self, *, final: bool) -> str:
        """Text not taken before; the end that may yet become a stop string waits until `final`."""
        end = len(self.text) if final else max(self._sent, len(self.text) - self._held_back)
        taken = self.text[self._sent : end]
        self._sent = end
        return taken

    def _extend(self, *, whole: bool) -> None:
        before = self._decode(self._ids[self._decoded_from : self._decoded_to])
        now = self._decode(self._ids[self._decoded_from :])
        if len(now) <= len(before) or (now.endswith(_BROKEN) and not whole):
            return
        self._decoded_from, self._decoded_to = self._decoded_to, len(self._ids)
        searched_from = max(0, len(self.text) - self._held_back)
        self.text += now[len(before) :]
        found = [(at, text) for text in self._stop if (at := self.text.find(text, searched_from)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self.text = self.text[:at]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
