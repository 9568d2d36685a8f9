"""What should serve, which inference servers there are, and what the swap controller made true."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, literal, select
from sqlalchemy.orm import Session

from domain.errors import NotFound
from domain.version import VersionKind
from registry.engines import checkpoint_id
from registry.session import db_now
from registry.tables import Alias, Assistant, Replica, ServingState, Version
from registry.upsert import upsert


@dataclass(frozen=True)
class Wanted:
    """A version that must answer for `assistant_name@alias`."""

    assistant_id: str
    assistant_name: str
    team_id: str
    alias: str
    """`v7` when the version itself was asked for."""
    version_id: str
    number: int
    served_name: str
    kind: VersionKind
    manifest_sha256: str | None
    """None for v0."""
    base_model: str
    checkpoint_id: str | None
    """The full version that it is or lies on; None where that is the base model itself."""
    update_id: str | None
    """None for v0."""

    @property
    def engine_base(self) -> str:
        """What an engine must run to answer for it (`base_model` of a replica)."""
        return self.checkpoint_id or self.base_model


def wanted(session: Session) -> list[Wanted]:
    """Every alias of every assistant; one query."""
    rows = session.execute(
        _versions(Alias.name.expression)
        .join(Alias, Alias.version_id == Version.id)
        .order_by(Assistant.created_at, Assistant.id, Alias.id)
    )
    return [Wanted(**row._mapping) for row in rows]


def served(session: Session) -> list[Wanted]:
    """What answered for every alias when it was last recorded."""
    rows = session.execute(
        _versions(ServingState.alias.expression).join(ServingState, ServingState.version_id == Version.id)
    )
    return [Wanted(**row._mapping) for row in rows]


def wanted_version(session: Session, team_id: str, assistant_name: str, number: int) -> Wanted:
    """Raises NotFound."""
    row = session.execute(
        _versions(literal(f"v{number}")).where(
            Assistant.team_id == team_id, Assistant.name == assistant_name, Version.number == number
        )
    ).one_or_none()
    if row is None:
        raise NotFound(f"There is no '{assistant_name}@v{number}'.", param="model")
    return Wanted(**row._mapping)


def register_replica(session: Session, url: str, base_model: str, model_name: str) -> None:
    """Known from now on as running `base_model`, a base's name or a whole model's id, under `model_name`."""
    row = {"url": url, "base_model": base_model, "model_name": model_name, "registered_at": db_now(session)}
    upsert(session, Replica, [row], keys=["url"])


def remove_replica(session: Session, url: str) -> None:
    session.execute(delete(Replica).where(Replica.url == url))


def replicas(session: Session) -> list[Replica]:
    return list(session.scalars(select(Replica).order_by(Replica.registered_at, Replica.url)))


def base_models_in_use(session: Session) -> list[str]:
    return list(session.scalars(select(Assistant.base_model).distinct().order_by(Assistant.base_model)))


def record_serving(
    session: Session, assistant_id: str, alias: str, version_id: str | None, error: str | None
) -> None:
    """`version_id` answers for the alias; `error` says why the wanted one does not, if it does not."""
    row = {
        "team_id": session.get_one(Assistant, assistant_id).team_id,
        "assistant_id": assistant_id,
        "alias": alias,
        "version_id": version_id,
        "error": error,
        "updated_at": db_now(session),
    }
    upsert(session, ServingState, [row], keys=["assistant_id", "alias"])


def serving_state(session: Session, assistant_id: str, alias: str) -> ServingState | None:
    """None until the swap controller has first seen the alias."""
    return session.get(ServingState, (assistant_id, alias), populate_existing=True)


def serving_states(session: Session, assistant: Assistant) -> dict[str, ServingState]:
    """By alias; without those that the swap controller has not seen yet."""
    states = session.scalars(select(ServingState).where(ServingState.assistant_id == assistant.id))
    return {state.alias: state for state in states}


def _versions(alias: ColumnElement[str]) -> Select[*tuple[Any, ...]]:
    return (
        select(
            Assistant.id.label("assistant_id"),
            Assistant.name.label("assistant_name"),
            Assistant.team_id,
            alias.label("alias"),
            Version.id.label("version_id"),
            Version.number,
            Version.served_name,
            Version.kind,
            Version.manifest_sha256,
            Assistant.base_model,
            checkpoint_id().label("checkpoint_id"),
            Version.update_id,
        )
        .select_from(Version)
        .join(Assistant, Assistant.id == Version.assistant_id)
    )
