"""Resident memory of this process, by Linux's /proc: above which level a training step goes."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def resident() -> int:
    """Bytes in memory now."""
    return _status("VmRSS")


def peak() -> int:
    """Most bytes in memory at once since `forget_peak`, or since the process began."""
    return _status("VmHWM")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")


def after_loading_weights(then: Callable[[int], None]) -> None:
    """Call `then` with the resident bytes once a model has read its weights.

    Weights are mapped from their file and come into memory when they are first read, so each is read here:
    what follows is above the weights and nothing of it is the weights.
    """
    original = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> PreTrainedModel:
        model = original(cls, *args, **kwargs)
        for tensor in model.parameters():
            tensor.sum()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        then(resident())
        return model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
