"""Weights shared out over processes (FSDP2): each holds a part of every layer and gathers a layer to run it.

What is gathered and when is torch's `fully_shard`. Here stands what the loop needs around it: processes
that run equally many forward passes, parts as plain tensors for the optimizer, whole tensors for files.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from domain.settings import Settings
from trainer import distributed


def wanted() -> bool:
    """Whether this run shards its weights: RATCHET_TRAINER_SHARDED asks for it and there are processes."""
    return distributed.size() > 1 and Settings().trainer_sharded


class Trunk(nn.Module):
    """A causal model up to its last hidden states. The output layer is a part of it, so that sharding
    gathers both together."""

    def __init__(self, causal: PreTrainedModel) -> None:
        super().__init__()
        self.causal = causal

    @property
    def head(self) -> Tensor:
        """The output layer's weight, [vocabulary, hidden]; when sharded, whole only after a forward pass."""
        weight: Tensor = self.causal.get_output_embeddings().weight
        return weight

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """[batch, tokens] -> [batch, tokens, hidden]."""
        states: Tensor = self.causal.base_model(input_ids=input_ids, **inputs).last_hidden_state
        return states


def shard(trunk: Trunk, compute: torch.dtype, replicated: Iterable[nn.Parameter] = ()) -> None:
    """Share out `trunk`'s parameters by layer but for the `replicated` ones; they run in `compute`.

    Afterwards its parameters are DTensors, whose parts keep the dtype that the parameters have now, and a
    gradient is the float32 mean over processes.
    """
    mesh = _mesh(trunk.causal.device.type)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    ignored = set(replicated)
    for module in list(trunk.modules()):
        if isinstance(module, GradientCheckpointingLayer):  # a decoder layer
            fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    # The embedding and the head stay gathered between the forward pass and the loss, which needs the head.
    fully_shard(trunk, mesh=mesh, mp_policy=policy, ignored_params=ignored, reshard_after_forward=False)


def release(trunk: Trunk) -> None:
    """Forget what is gathered: the parts have changed."""
    assert isinstance(trunk, FSDPModule)
    trunk.reshard()


def part_of(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter or gradient: all of it unless sharded. Shares its memory."""
    held: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return held.detach()


def whole(part: Tensor, parameter: Tensor) -> Tensor:
    """The whole of what lies in parts as `parameter` does, on the first process's CPU; empty elsewhere."""
    assert isinstance(parameter, DTensor)
    gathered = DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()
    return gathered.cpu() if distributed.is_first() else torch.empty(0)


def cut(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, as `parameter` lies."""
    pieces = torch.chunk(whole, distributed.size(), dim=0)
    rank = distributed.rank()
    return pieces[rank] if rank < len(pieces) else whole[:0]


def norm_of_parts(norm: Tensor) -> Tensor:
    """From the norm of this process's parts, the norm of the whole."""
    squared = norm.square()
    dist.all_reduce(squared)
    return squared.sqrt()


class Lockstep:
    """Equal numbers of forward passes on every process: gathering a layer takes them all.

    Shares differ in length (answers end early, batches pack differently), so each forward pass is announced,
    and a process that has none left in a block runs empty ones until nobody has.
    """

    def announce(self) -> None:
        """Before a forward pass."""
        self._working(1)

    def finish(self, empty_pass: Callable[[], None]) -> None:
        """At the end of a block that all processes enter alike."""
        while self._working(0):
            empty_pass()

    def _working(self, mine: int) -> int:
        count = torch.tensor([mine])
        dist.all_reduce(count)
        return int(count)


@lru_cache(maxsize=1)
def _mesh(device: str) -> DeviceMesh:
    return init_device_mesh(device, (distributed.size(),))
