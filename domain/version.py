"""Versions: what an update makes, what its files must be, and how a request names one."""

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from domain.errors import InvalidInput
from domain.skill import NAME_PATTERN

CHAMPION = "champion"
"""The alias that a bare assistant name means."""

VersionKind = Literal["base", "adapter", "full"]


class ManifestFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    """Relative to the version's folder, POSIX separators."""
    size: int
    """Bytes."""
    sha256: str


class Checkpoint(BaseModel):
    """A full version that adapters lie on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version_id: str
    manifest_sha256: str


class Manifest(BaseModel):
    """Every file of a version; written last, so that its presence means that the rest is whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: VersionKind
    base_model: str
    update_id: str
    checkpoint: Checkpoint | None = None
    """What an adapter lies on; None: the base model itself."""
    files: list[ManifestFile]


def is_companion(file_name: str) -> bool:
    """Whether a whole model's folder holds this file for the engine to read besides the weights: its config,
    tokenizer and chat template. Training changes none of them."""
    if file_name == "manifest.json" or file_name.endswith(".index.json"):
        return False
    return file_name.endswith((".json", ".jinja")) or file_name in (
        "tokenizer.model",
        "merges.txt",
        "vocab.txt",
    )


class WholeModel(BaseModel):
    """Weights that need an engine process of their own: a full version, or an update's candidate for one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    """The version's, or the update's."""
    served_name: str
    base_model: str
    """Whose shapes, config and tokenizer it shares."""
    manifest_sha256: str | None
    """Of a version; None for a candidate."""
    folder: str | None
    """Of a candidate; None for a version, whose files are the store's."""


@dataclass(frozen=True)
class ModelName:
    """`assistant`, `assistant@alias` or `assistant@v7`, as it stands in a request's `model`."""

    assistant: str
    alias: str | None
    version: int | None

    @classmethod
    def parse(cls, text: str) -> "ModelName":
        """Raises InvalidInput when the text is none of the three forms."""
        assistant, _, reference = text.partition("@")
        if not re.match(NAME_PATTERN, assistant) or (reference == "" and "@" in text):
            raise InvalidInput(
                f"'{text}' is not 'assistant', 'assistant@alias' or 'assistant@v7'.", param="model"
            )
        if not reference:
            return cls(assistant, CHAMPION, None)
        number = parse_version(reference)
        if number is not None:
            return cls(assistant, None, number)
        if not re.match(NAME_PATTERN, reference):
            raise InvalidInput(f"'{reference}' is neither an alias nor a version like 'v7'.", param="model")
        return cls(assistant, reference, None)


def parse_version(text: str) -> int | None:
    """`v7` -> 7, else None."""
    match = re.fullmatch(r"v(0|[1-9]\d{0,8})", text)
    return int(match.group(1)) if match else None


def is_reserved_alias(name: str) -> bool:
    """An alias must not look like a version."""
    return parse_version(name) is not None
