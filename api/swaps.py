"""The swap controller over this installation's ledger, version files and base models."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session, sessionmaker

from api.configured_engines import ConfiguredEngines
from artifacts import base_models
from artifacts.version_store import VersionStore
from domain.ids import new_id
from domain.settings import Settings
from registry import engines, retention, serving
from registry.serving import Wanted
from registry.tables import Replica
from serving.controller import SwapController
from serving.routes import RouteTable

DEMAND_SECONDS = 60.0
"""How long a full version's engine stays asked for after this process died: longer than a start takes."""


def make_controller(
    settings: Settings,
    sessions: sessionmaker[Session],
    reads: sessionmaker[Session],
    store: VersionStore,
    routes: RouteTable,
) -> SwapController:
    """A controller that keeps `routes`; enter it to start its thread."""
    ledger = _Ledger(settings, sessions, reads, store)
    return SwapController(
        wanted=ledger.wanted,
        served=ledger.served,
        replicas=ledger.replicas,
        verify=ledger.files,
        held=store.held,
        base_config=ledger.base_config,
        record=ledger.record,
        demand=ledger.demand,
        routes=routes,
        max_rank=settings.adapter_rank_limit,
        slots=settings.engine_adapters,
        priorities=settings.starts_engines,
        idle_seconds=settings.version_idle_seconds,
    )


class _Ledger:
    """Each method is a short transaction of its own, called from the controller's threads."""

    def __init__(
        self,
        settings: Settings,
        sessions: sessionmaker[Session],
        reads: sessionmaker[Session],
        store: VersionStore,
    ) -> None:
        self._settings = settings
        self._sessions = sessions
        self._reads = reads
        self._store = store
        self._configured = ConfiguredEngines(settings.engine_urls, sessions)
        self._mark = new_id("gw")

    def wanted(self) -> list[Wanted]:
        with self._reads() as session:
            return serving.wanted(session)

    def served(self) -> list[Wanted]:
        with self._reads() as session:
            return serving.served(session)

    def replicas(self, mistaken: Collection[str]) -> list[Replica]:
        """The registered engines; those that the settings name are registered when they first answer, and
        asked again when they are `mistaken`: their urls run something else than the ledger says."""
        with self._reads() as session:
            known = serving.replicas(session)
            used = serving.base_models_in_use(session)
        if not self._configured.register(known, used, mistaken):
            return known
        with self._reads() as session:
            return serving.replicas(session)

    def record(self, assistant_id: str, alias: str, version_id: str | None, error: str | None) -> None:
        with self._sessions.begin() as session:
            serving.record_serving(session, assistant_id, alias, version_id, error)

    def demand(self, version_ids: Sequence[str]) -> Mapping[str, str]:
        if not self._settings.starts_engines:
            return dict.fromkeys(version_ids, "those at RATCHET_ENGINE_URL are not Ratchet's to start.")
        with self._sessions.begin() as session:
            return engines.demand_serving(session, self._mark, version_ids, DEMAND_SECONDS)

    def files(self, version_id: str, manifest_sha256: str) -> Path:
        """The version's folder, verified; retention leaves it alone from before the first look."""
        with self._sessions.begin() as session:
            retention.use(session, version_id)
        return self._store.verify(version_id, manifest_sha256)

    def base_config(self, base_model: str) -> Mapping[str, Any]:
        folder = base_models.resolve(base_model, self._settings.cache_dir).path
        config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        return config
