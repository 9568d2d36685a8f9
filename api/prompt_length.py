"""Refuses demonstrations that no context window of the base model can hold. Torch-free."""

from pathlib import Path
from threading import Lock

from tokenizers import Tokenizer

from artifacts import base_models
from domain.demonstration import Demonstration
from domain.errors import DemonstrationsRejected, LineError, UnknownBaseModel


class PromptLengths:
    """Counts tokens with the base model's own tokenizer, loaded once per base model."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._tokenizers: dict[str, Tokenizer] = {}
        self._lock = Lock()

    def tokenizer(self, base_model: str) -> Tokenizer:
        """Raises UnknownBaseModel when the model or its tokenizer.json cannot be had."""
        with self._lock:
            if base_model not in self._tokenizers:
                self._tokenizers[base_model] = self._load(base_model)
            return self._tokenizers[base_model]

    def _load(self, base_model: str) -> Tokenizer:
        file = base_models.resolve(base_model, self._cache_dir).path / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # all that the tokenizers library raises for a bad file
            raise UnknownBaseModel(
                f"{file} is not a readable tokenizer: {error}", param="base_model"
            ) from error
        tokenizer.no_truncation()
        return tokenizer

    def require_fit(
        self, base_model: str, window: int, demonstrations: list[tuple[int, Demonstration]]
    ) -> None:
        """`demonstrations` with their line numbers; `window` in tokens.

        Counts the bare texts, so nothing that fits is refused; what the chat template and a teacher's
        examples add is for preflight. Raises DemonstrationsRejected naming every line that is too long.
        """
        too_long: list[LineError] = []
        for line, demonstration in demonstrations:
            prompt = [message.content for message in demonstration.messages]
            texts = [*prompt, demonstration.response]
            # A token covers at least one byte: short texts need no count.
            if sum(len(text.encode()) for text in texts) < window:
                continue
            counts = self._count(base_model, texts)
            if sum(counts) >= window:
                too_long.append(
                    LineError(
                        line=line,
                        param="messages",
                        message=f"prompt ({sum(counts[:-1])} tokens) and response ({counts[-1]} tokens) "
                        f"exceed the model's context window of {window} tokens",
                    )
                )
        if too_long:
            raise DemonstrationsRejected(too_long)

    def _count(self, base_model: str, texts: list[str]) -> list[int]:
        tokenizer = self.tokenizer(base_model)
        return [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
