"""How much memory this process has used at most, and could have in all, on the device that trains."""

import contextlib
import os
from pathlib import Path

import torch

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def reset_peak(device: torch.device) -> None:
    """Begin a new high-water mark. Where the kernel refuses, the old one stays: an upper bound."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """High-water mark of the process's resident memory, or of what its allocator reserved on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return _status("VmHWM")


def used_bytes(device: torch.device) -> int:
    """The same, now."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return _status("VmRSS")


def available_bytes(device: torch.device) -> int:
    """What this process could use in all: its own and what is free, at most its control group's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    reachable = int(fields["MemAvailable"].split()[0]) * 1024 + used_bytes(device)
    with contextlib.suppress(OSError, ValueError):  # no control groups here, or "max": no limit
        return min(reachable, int(_CGROUP_LIMIT.read_text()))
    return reachable


def _status(name: str) -> int:
    """A field of /proc/self/status that the kernel gives in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status of process {os.getpid()} has no {name}")
