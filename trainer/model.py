"""What the loop asks of the model that trains, whether adapters on a base or every weight trains."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from trainer.packing import PackedBatch, sharing_is_exact

Role = Literal["student", "parent", "ema"]
"""Whose weights run: `student` trains; `parent` is the frozen version the update starts from; `ema` is the
student's moving average. None, where a role is asked for, is the bare base."""


def compute_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


class Model(ABC):
    """A causal language model in several roles; exactly one of them is in use at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, causal: PreTrainedModel) -> None:
        """`causal` tells what all roles share: the window, the tokens that end an answer, the device."""
        self.tokenizer = tokenizer
        self.context_window: int = causal.config.max_position_embeddings
        self._window = getattr(causal.config.get_text_config(), "sliding_window", None)
        self.device = causal.device
        generation = causal.generation_config
        configured = generation.eos_token_id if generation else None
        ids = configured if isinstance(configured, list) else [configured]
        self.stop_ids = frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)
        """Tokens that end an answer."""
        self._in_use: Role | None = None

    @property
    def head(self) -> Tensor:
        """The output layer's weight, [vocabulary, hidden], of the role in use."""
        return self.head_of(self._in_use)

    def text(self, tokens: list[int]) -> str:
        decoded = self.tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(decoded, str)
        return decoded

    @contextmanager
    def using(self, role: Role | None) -> Iterator[None]:
        """Run with the weights of `role` inside the block and with the bare base's after it."""
        self._use(role)
        try:
            yield
        finally:
            self._use(None)

    def hidden(
        self,
        input_ids: Tensor,
        *,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states, [batch, tokens, hidden], of the role in use; `cache` is extended."""
        out = self._causal(self._in_use).base_model(
            input_ids=input_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        states: Tensor = out.last_hidden_state
        return states

    def packed_states(self, batch: PackedBatch) -> Tensor:
        """Last hidden states of every pack's tokens, [R, L, hidden], of the role in use."""
        mask = None if batch.mask is None else batch.mask.to(self.device)
        return self.hidden(
            batch.ids.to(self.device), attention_mask=mask, position_ids=batch.positions.to(self.device)
        )

    @cached_property
    def shares_prefixes(self) -> bool:
        """Whether sequences may be packed as a tree. A sliding window counts columns, not positions."""
        return self._window is None and sharing_is_exact(self.packed_states)

    @abstractmethod
    def head_of(self, role: Role | None) -> Tensor:
        """The output layer's weight in `role`, [vocabulary, hidden]; it requires a gradient where it
        trains."""

    @abstractmethod
    def parent(self) -> Role | None:
        """The role of the version this update starts from; None when that is the base."""

    @abstractmethod
    def parameters(self, role: Role) -> dict[str, Tensor]:
        """What of `role` differs from the base, or all of it, in float32 by stable name."""

    @abstractmethod
    def updated(self, role: Role) -> None:
        """To be called after `parameters(role)` were changed in place: what runs is made to follow."""

    @abstractmethod
    def save_student(self, folder: Path, base_model: str) -> None:
        """Write the student as a version's files; `base_model` is the base's name."""

    def _use(self, role: Role | None) -> None:
        self._in_use = role

    @abstractmethod
    def _causal(self, role: Role | None) -> PreTrainedModel:
        """The module that runs for `role`."""
