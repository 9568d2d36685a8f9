"""The processes that train one job together: started by torchrun, joined by gloo (CPU) or NCCL (CUDA).

Every process builds the same schedule and holds the same answers. Each samples, scores and back-propagates
its share of the sequences, whose weights in the loss are those of the whole batch, so that gradients add
up to the one-process gradient. The first process alone writes: lines, checkpoints, the version. Without
torchrun there is one process, and each function returns what it was given.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from domain.errors import RatchetError

T = TypeVar("T")

BUCKET_ELEMENTS = 1 << 24
"""Gradients that are added up in one message: 64 MiB of float32."""


def launched() -> bool:
    """Whether torchrun started this process."""
    return bool(dist.is_torchelastic_launched())


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes that torchrun started, if any; at the end wait for all, and part.

    For torchrun ends the others as soon as one has ended with another status than 0, and the first process
    may still be writing a checkpoint then, or saying why. After an exception nobody is waited for or parted
    from, as both could hang: the others fail when this process's end closes its connections.
    """
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield
    any_of(False)
    dist.destroy_process_group()


def fails_first() -> bool:
    """Whether no other process of this launch has asked before: whose error made theirs. To be asked before
    the others can learn of it, once."""
    if not launched():
        return True
    try:
        (Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1] / "failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a full disk, which may be the error itself
        return True
    return True


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of `items`, which all processes hold in the same order."""
    return items[rank() :: size()]


def collect(mine: Sequence[T]) -> list[T]:
    """Everyone's results in order: `collect([f(x) for x in share(items)])` is `[f(x) for x in items]`."""
    parts = _gather(list(mine))
    return [parts[place % size()][place // size()] for place in range(sum(map(len, parts)))]


def concatenate(rows: Tensor) -> Tensor:
    """Everyone's rows, [N, ...] with an N of each process's own, on the CPU; by process, not by `share`."""
    return torch.cat(_gather(rows.cpu()))


def by_first(work: Callable[[], T]) -> T:
    """What `work` returns on the first process, which alone does it, on all; a RatchetError that it raises
    is raised on all."""
    result: tuple[T | None, RatchetError | None] = (None, None)
    if is_first():
        try:
            result = (work(), None)
        except RatchetError as error:
            if size() == 1:
                raise
            result = (None, error)
    value, error_of_first = _gather(result)[0]
    if error_of_first is not None:
        raise error_of_first
    return cast(T, value)


def any_of(flag: bool) -> bool:
    return any(_gather(flag))


def agree(value: int) -> bool:
    """Whether every process has the same value."""
    return len(set(_gather(value))) == 1


def add_up(value: float) -> float:
    """The sum over processes."""
    return sum(_gather(value))


def add_up_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its sum over processes; a process without one counts as zero."""
    parameters = list(parameters)
    if size() == 1 or not any_of(any(parameter.grad is not None for parameter in parameters)):
        return
    bucket: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(grad.numel() for grad in bucket) >= BUCKET_ELEMENTS:
            _add_up(bucket)
            bucket = []
    if bucket:
        _add_up(bucket)


def _add_up(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _gather(value: T) -> list[T]:
    """Every process's value, by rank. Values travel pickled, between processes of one run only."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found
