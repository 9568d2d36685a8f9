"""What the loop asks of the model that trains, whether adapters on a base or every weight trains."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from trainer import sharding
from trainer.packing import PackedBatch, sharing_is_exact
from trainer.sharding import Lockstep, Trunk

Role = Literal["student", "parent", "ema"]
"""Whose weights run: `student` trains; `parent` is the frozen version the update starts from; `ema` is the
student's moving average. None, where a role is asked for, is the bare base."""


def compute_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def trunk_parameters(causal: PreTrainedModel) -> int:
    """Parameters of matrix products between the embedding and the output layer; read from a base without
    adapters."""
    apart = {id(causal.get_input_embeddings().weight), id(causal.get_output_embeddings().weight)}
    return sum(p.numel() for p in causal.parameters() if p.dim() == 2 and id(p) not in apart)


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
        self.shares_prefixes = False
        """Whether sequences may be packed as a tree."""
        self.trunk_parameters = trunk_parameters(causal)
        self.tokens_read = 0
        """Padded tokens of all forward passes so far."""
        self._in_use: Role | None = None
        self._lockstep = Lockstep() if sharding.wanted() else None

    @property
    def head(self) -> Tensor:
        """`head_of` the role in use."""
        return self.head_of(self._in_use)

    def text(self, tokens: list[int]) -> str:
        decoded = self.tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(decoded, str)
        return decoded

    @contextmanager
    def using(self, role: Role | None) -> Iterator[None]:
        """Run with the weights of `role` inside the block and with the bare base's after it.

        Processes that train together enter the same blocks in the same order, with as many or as few
        forward passes in each as their shares need; where gradients are enabled, a backward pass follows
        each forward pass of the student.
        """
        self._use(role)
        try:
            yield
            self.catch_up()
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
        if self._lockstep:
            self._lockstep.announce()
        self.tokens_read += input_ids.numel()
        states: Tensor = self._trunk(self._in_use)(
            input_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        return states

    def packed_states(self, batch: PackedBatch) -> Tensor:
        """Last hidden states of every pack's tokens, [R, L, hidden], of the role in use."""
        mask = None if batch.mask is None else batch.mask.to(self.device)
        return self.hidden(
            batch.ids.to(self.device), attention_mask=mask, position_ids=batch.positions.to(self.device)
        )

    def catch_up(self) -> None:
        """Before processes exchange anything else inside a `using` block: wait until all have run their
        passes."""
        if self._lockstep:
            self._lockstep.finish(self._empty_pass)

    def head_of(self, role: Role | None) -> Tensor:
        """The output layer's weight in `role`, [vocabulary, hidden]; it requires a gradient where it trains.

        Sharded, it is whole only between a forward pass of the role and the next change of its weights.
        """
        return self._trunk(role).head

    def clip_gradients(self, max_norm: float) -> float:
        """After a step's last backward pass: the student's gradients are put on `parameters("student")`,
        summed over processes and scaled down to `max_norm`. Returns their norm before that."""
        self._finish_gradients()
        parameters = list(self.parameters("student").values())
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.in_parts:
            norm = sharding.norm_of_parts(norm)
        clip_grads_with_norm_(parameters, max_norm, norm)
        return float(norm)

    def weight_bytes(self) -> int:
        """Memory of all weights of all roles, on this process."""
        roles: list[Role | None] = [None, "student", "parent", "ema"]
        held = [role for role in roles if self.has(role)]
        weights = [sharding.part_of(tensor) for role in held for tensor in self._trunk(role).parameters()]
        for role in held:
            if role in ("student", "ema"):  # full fine-tuning has masters beside what runs
                weights += self.parameters(role).values()
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in weights}.values())

    @property
    def in_parts(self) -> bool:
        """Whether `parameters` are this process's parts of tensors that lie in parts on all processes."""
        return False

    def whole(self, name: str, part: Tensor) -> Tensor:
        """What lies over processes as the student's parameter `name` does, whole on the first one and
        empty on the others; a scalar is the same everywhere. All processes ask alike."""
        return part

    def part(self, name: str, whole: Tensor) -> Tensor:
        """The inverse of `whole`, from a tensor that every process holds."""
        return whole

    @abstractmethod
    def has(self, role: Role | None) -> bool:
        """Whether `role` can be used: full fine-tuning holds only the copies that its recipe needs."""

    @abstractmethod
    def parent(self) -> Role | None:
        """The role of the version this update starts from; None when that is the base."""

    @abstractmethod
    def parameters(self, role: Role) -> dict[str, Tensor]:
        """What of `role` can differ from the base, in float32 by stable name."""

    @abstractmethod
    def updated(self, role: Role) -> None:
        """To be called after `parameters(role)` were changed in place: what runs is made to follow."""

    @abstractmethod
    def save_student(self, folder: Path, base_model: str) -> None:
        """Write the student as a version's files; `base_model` is the base's name. All processes call it,
        the first one writes."""

    @abstractmethod
    def _finish_gradients(self) -> None:
        """Put gradients, summed over processes, on `parameters("student")`."""

    @abstractmethod
    def _trunk(self, role: Role | None) -> Trunk:
        """The module that runs for `role`."""

    def _use(self, role: Role | None) -> None:
        self._in_use = role

    def _try_packing(self) -> None:
        """Once the student is there. A sliding window counts columns, not positions."""
        with torch.no_grad(), self.using("student"):
            self.shares_prefixes = self._window is None and sharing_is_exact(self.packed_states)

    def _empty_pass(self) -> None:
        """A pass like the other processes', of one token and without effect."""
        states = self._trunk(self._in_use)(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        if torch.is_grad_enabled() and self._in_use == "student":
            nothing = states.sum() * 0
            if self.head.requires_grad:
                nothing = nothing + self.head.sum() * 0
            nothing.backward()
