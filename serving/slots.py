"""How many adapters an engine holds, and which of them goes when there is no room or nobody needs it."""

import logging

from domain.errors import EngineUnavailable
from serving.fleet import Fleet
from serving.replica import NO_SLOT, SERVED_NAME, Replica
from serving.routes import Endpoint

logger = logging.getLogger(__name__)

EVALUATION_SLOTS = 2
"""Kept free on every engine: an evaluation loads an adapter at a time, under a name of its own."""


class Slots:
    """Each method wants the replica's lock held; `present` is what its engine holds, and is kept true."""

    def __init__(self, fleet: Fleet, slots: int) -> None:
        """`slots`: adapters that an engine may hold, those of evaluations included."""
        self._fleet = fleet
        self._slots = slots

    def make_room(self, replica: Replica, present: set[str]) -> None:
        """Unload, least recently used first, until one more adapter fits.

        What aliases name and what is in use stays. Raises EngineUnavailable (`no_slot`) when nothing else
        is left.
        """
        routes = self._fleet.routes
        others = present - {replica.model_name}
        own = {name for name in others if SERVED_NAME.search(name)}
        room = self._slots - max(EVALUATION_SLOTS, len(others - own))
        for name in sorted(own, key=lambda one: routes.last_used(Endpoint(replica.url, one))):
            if len(own) < room:
                return
            if self._retire(replica, name, 0.0):
                own.discard(name)
                present.discard(name)
        if len(own) >= room:
            raise EngineUnavailable(
                f"The inference engine at {replica.url} holds {len(others)} adapters and may hold "
                f"{self._slots} (RATCHET_ENGINE_ADAPTERS, {EVALUATION_SLOTS} of them for evaluations); "
                "none of them can go, since aliases name them or requests use them.",
                code=NO_SLOT,
            )

    def unload_idle(self, replica: Replica, present: set[str], idle_seconds: float) -> None:
        """Unload what no alias names, nobody holds and nobody used for so long."""
        for name in present - {replica.model_name}:
            if SERVED_NAME.search(name) is not None:
                self._retire(replica, name, idle_seconds)

    def _retire(self, replica: Replica, name: str, idle_seconds: float) -> bool:
        """Whether the adapter was unloaded, because nobody needs it."""
        fleet = self._fleet
        with fleet.lock:
            # In one step with the flips: a version that an alias takes up again is either still
            # routed, or no longer acknowledged and loaded afresh.
            needed = {replica.engine_model(version) for version in fleet.needed(replica)}
            if name in needed or not fleet.routes.retire(Endpoint(replica.url, name), idle_seconds):
                return False
            replica.acknowledged.discard(name)
        replica.unload(name)
        logger.info("unloaded %s from %s", name, replica.url)
        return True
