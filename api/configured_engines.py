"""The running inference servers that RATCHET_ENGINE_URL names: each is registered when it first answers and
asked again when it serves another model; those that it named at an earlier start are forgotten."""

import logging
import time
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from typing import Any

import httpx
from sqlalchemy.orm import Session, sessionmaker

from registry import serving
from registry.tables import Replica

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 2.0
AGAIN_SECONDS = 2.0
"""Between two questions to a server that did not answer, or serves no base that is used here."""


class ConfiguredEngines:
    """Used by one thread at a time."""

    def __init__(self, urls: Sequence[str], sessions: sessionmaker[Session]) -> None:
        self._urls = urls
        self._sessions = sessions
        self._ask_at: dict[str, float] = {}
        """time.monotonic"""
        self._told: dict[str, str] = {}
        self._looked = False

    def register(self, known: Sequence[Replica], used: Sequence[str], mistaken: Collection[str]) -> bool:
        """Whether the registered servers changed: each is a replica of the first base model in `used` that it
        serves.

        Those that are registered are asked again at the first look, since another server may have taken the
        url while nobody looked, and when their urls are `mistaken`.
        """
        first = not self._looked
        changed = self._forget_unnamed(known)
        registered = {replica.url: (replica.base_model, replica.model_name) for replica in known}
        for url in self._urls:
            settled = url in registered and not first and url not in mistaken
            if settled or not used or self._ask_at.get(url, 0.0) > time.monotonic():
                continue
            self._ask_at[url] = time.monotonic() + AGAIN_SECONDS
            cards = self._models(url)
            if cards:
                changed |= self._enter(url, cards, used, registered.get(url))
        return changed

    def _enter(
        self, url: str, cards: Sequence[dict[str, Any]], used: Sequence[str], before: tuple[str, str] | None
    ) -> bool:
        """Register the server as what it serves, or as nothing; whether that is new. `before`: base model and
        name that it is registered with, if it is."""
        if before is not None and served_name(cards, before[0]) == before[1]:
            return False
        found = [(base, name) for base in used if (name := served_name(cards, base)) is not None]
        if not found:
            names = ", ".join(str(card["id"]) for card in cards if card.get("parent") is None)
            self._tell(url, f"serves {names}, and no assistant has that base model")
        with self._sessions.begin() as session:
            if found:
                serving.register_replica(session, url, *found[0])
                logger.info("engine %s serves %s as '%s'", url, *found[0])
            elif before is not None:
                serving.remove_replica(session, url)
        return bool(found) or before is not None

    def _forget_unnamed(self, known: Sequence[Replica]) -> bool:
        """Once, at the first look: while two settings are in use, each process registers its own list."""
        unnamed = [replica.url for replica in known if replica.url not in self._urls]
        first, self._looked = not self._looked, True
        if not first or not self._urls or not unnamed:
            return False
        with self._sessions.begin() as session:
            for url in unnamed:
                serving.remove_replica(session, url)
        logger.info("forgot %s: RATCHET_ENGINE_URL does not name it", ", ".join(unnamed))
        return True

    def _models(self, url: str) -> list[dict[str, Any]]:
        try:
            reply = httpx.get(f"{url}/v1/models", timeout=ANSWER_SECONDS, trust_env=False)
            reply.raise_for_status()
            return [card for card in reply.json()["data"] if isinstance(card["id"], str)]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            self._tell(url, f"does not list its models: {error}")
            return []

    def _tell(self, url: str, what: str) -> None:
        if self._told.get(url) != what:
            self._told[url] = what
            logger.warning("engine %s %s", url, what)


def served_name(cards: Sequence[dict[str, Any]], base_model: str) -> str | None:
    """Under which name of /v1/models the server answers with the bare `base_model`; None if it does not.

    A model of that name is taken at its word. Another one is it when it was loaded from where the base
    model lies: its hub id, its folder, or a folder called as the cache calls it.
    """
    if any(card["id"] == base_model for card in cards):
        return base_model
    folder = base_model.replace("/", "--")
    for card in cards:
        root = card.get("root")
        if card.get("parent") is not None or not isinstance(root, str):
            continue
        if root == base_model or PurePosixPath(root).name == folder:
            return str(card["id"])
    return None
