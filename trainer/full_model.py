"""Full fine-tuning: every weight trains, in float32, and each role is a model of its own."""

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from domain.version import is_companion
from trainer import distributed, sharding
from trainer.model import Model, Role
from trainer.sharding import Trunk


class FullModel(Model):
    """A student with float32 master weights, its moving average likewise, and frozen copies."""

    def __init__(
        self,
        start: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        compute: torch.dtype,
        stored: torch.dtype,
        base_path: Path,
        frozen: Mapping[Role | None, PreTrainedModel],
        *,
        has_parent: bool,
        averaged: bool,
    ) -> None:
        """`start`: the version the update starts from, in float32; it becomes the student.

        Passes run in `compute`; the student is saved in `stored`, with the config and tokenizer files of
        `base_path`. `frozen`: the models of the roles that
        neither train nor average. `averaged`: whether there is a moving average.
        """
        super().__init__(tokenizer, start)
        self._stored = stored
        self._base_path = base_path
        self._has_parent = has_parent
        average = copy.deepcopy(start) if averaged else None
        self._student = _Masters(start, compute, trained=True)
        self._masters: dict[Role, _Masters] = {"student": self._student}
        if average is not None:
            self._masters["ema"] = _Masters(average, compute, trained=False)
        self._trunks: dict[Role | None, Trunk] = {role: one.trunk for role, one in self._masters.items()}
        for role, causal in frozen.items():
            self._trunks[role] = _frozen(causal, compute)
        self._try_packing()

    @property
    def in_parts(self) -> bool:
        return self._lockstep is not None

    def has(self, role: Role | None) -> bool:
        return role in self._trunks

    def parent(self) -> Role | None:
        return "parent" if self._has_parent else None

    def parameters(self, role: Role) -> dict[str, Tensor]:
        """The float32 masters of the student or its average."""
        return self._masters[role].weights

    def updated(self, role: Role) -> None:
        self._masters[role].publish()

    def whole(self, name: str, part: Tensor) -> Tensor:
        return sharding.whole(part, self._student.run[name]) if self.in_parts and part.dim() else part

    def part(self, name: str, whole: Tensor) -> Tensor:
        return sharding.cut(whole, self._student.run[name]) if self.in_parts and whole.dim() else whole

    def save_student(self, folder: Path, base_model: str) -> None:
        """Write a whole Hugging Face folder: weights, and the base's own config, tokenizer and chat template,
        byte for byte, so that whoever serves it can see that nothing else changed."""
        state = {
            name: self.whole(name, part).to(self._stored) for name, part in self._student.weights.items()
        }
        if not distributed.is_first():
            return
        self._student.trunk.causal.save_pretrained(folder, state_dict=state)
        for path in folder.iterdir():
            if is_companion(path.name):
                path.unlink()
        for path in self._base_path.iterdir():
            if path.is_file() and is_companion(path.name):
                shutil.copyfile(path, folder / path.name)
        for path in folder.iterdir():
            with path.open("rb") as written:
                os.fsync(written.fileno())

    def _finish_gradients(self) -> None:
        self._student.finish_gradients()

    def _trunk(self, role: Role | None) -> Trunk:
        if role not in self._trunks:
            raise LookupError(f"The recipe needs no copy of the {role or 'base'}, so there is none.")
        return self._trunks[role]


class _Masters:
    """Float32 weights that change, and what runs: a copy in the compute dtype, made once per change.

    Casting within each pass instead would read all weights once more per sampled token. Where the compute
    dtype is float32 the weights run themselves; sharded, each layer is cast as it is gathered.
    """

    def __init__(self, causal: PreTrainedModel, compute: torch.dtype, *, trained: bool) -> None:
        causal.eval().requires_grad_(trained)
        self.trunk = Trunk(causal)
        self._sharded = sharding.wanted()
        self._cast = compute != torch.float32 and not self._sharded
        if self._sharded:
            sharding.shard(self.trunk, compute)
        self.run = dict(causal.named_parameters())
        """Parameters of the module that runs, by name; tied ones once."""
        self.weights: dict[str, Tensor] = dict(self.run)
        if self._sharded:
            self.weights = {name: sharding.part_of(parameter) for name, parameter in self.run.items()}
        elif self._cast:
            self.weights = {name: parameter.detach().clone() for name, parameter in self.run.items()}
            _cast(causal, compute)
            if trained:
                self._accumulate_in_float32()

    @torch.no_grad()
    def publish(self) -> None:
        """The weights changed in place: let what runs follow."""
        if self._sharded:
            sharding.release(self.trunk)
        elif self._cast:
            for name, parameter in self.run.items():
                parameter.copy_(self.weights[name])

    def finish_gradients(self) -> None:
        """Gradients summed over processes, on `weights`."""
        if not self._sharded:
            distributed.add_up_gradients(self.weights.values())
            return
        for name, parameter in self.run.items():
            if parameter.grad is not None:
                # fully_shard takes the mean; its sum would need an operation that gloo lacks (PREMUL_SUM).
                self.weights[name].grad = sharding.part_of(parameter.grad) * distributed.size()
                parameter.grad = None

    def _accumulate_in_float32(self) -> None:
        """Move each backward pass's gradient to its master: a sum of several in bfloat16 would lose bits."""

        def hook_for(master: Tensor) -> Callable[[Tensor], None]:
            def move(parameter: Tensor) -> None:
                assert parameter.grad is not None
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

            return move

        for name, parameter in self.run.items():
            parameter.register_post_accumulate_grad_hook(hook_for(self.weights[name]))


def _frozen(causal: PreTrainedModel, compute: torch.dtype) -> Trunk:
    causal.eval().requires_grad_(False)
    _cast(causal, compute)
    trunk = Trunk(causal)
    if sharding.wanted():
        sharding.shard(trunk, compute)
    return trunk


def _cast(causal: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters only: buffers such as rotary frequencies stay in float32, as from_pretrained leaves them."""
    for parameter in causal.parameters():
        parameter.data = parameter.data.to(dtype)
