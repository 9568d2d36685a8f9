"""Prefixed, sortable-by-nothing identifiers: 96 random bits after a prefix that says what it names."""

import secrets
from typing import Literal

Prefix = Literal[
    "team",
    "asst",
    "skill",
    "batch",
    "demo",
    "upd",
    "ver",
    "meas",
    "move",
    "audit",
    "req",
    "hook",
    "msg",
    "file",
    "ftjob",
    "gw",
]


def new_id(prefix: Prefix) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
