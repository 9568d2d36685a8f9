"""Which whole models need an engine process of their own, who asks for them, and why one is not running.

A full version is served, and a candidate for one measured, by an engine that runs nothing else. Whoever
needs one leaves a demand here; who supervises engines starts and stops them by it. Aliases need no demand
of their own: what they name is always wanted.
"""

from collections.abc import Collection

from sqlalchemy import ColumnElement, Select, and_, case, delete, exists, false, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from domain.update import Status
from domain.version import WholeModel
from registry.claims import Claim, held
from registry.session import clock, db_now
from registry.tables import Alias, Assistant, EngineDemand, Replica, Update, Version
from registry.upsert import upsert


def checkpoint_id(version: type[Version] = Version) -> ColumnElement[str | None]:
    """Id of the full version that a version is or lies on; null where that is the base model itself."""
    lies_on = version.manifest["checkpoint"]["version_id"].as_string()
    return case((version.kind == "full", version.id), else_=lies_on)


def checkpoint_of(session: Session, version: Version) -> Version | None:
    """The full version that `version` is or lies on; None where that is the base model itself."""
    found = session.scalar(select(checkpoint_id()).where(Version.id == version.id))
    return None if found is None else session.get_one(Version, found)


def demand_serving(
    session: Session, holder: str, model_ids: Collection[str], seconds: float
) -> dict[str, str]:
    """These full versions, and no others, are needed by `holder`, a gateway, for `seconds` more; returns why
    some of them are not running."""
    session.execute(
        delete(EngineDemand).where(EngineDemand.holder == holder, EngineDemand.model_id.not_in(model_ids))
    )
    if not model_ids:
        return {}
    until = db_now(session) + seconds
    rows = [{"model_id": id, "holder": holder, "until": until} for id in model_ids]
    upsert(session, EngineDemand, rows, keys=["model_id", "holder"])
    known = select(EngineDemand.model_id, EngineDemand.error).where(
        EngineDemand.holder == holder, EngineDemand.error.is_not(None)
    )
    return {id: error or "" for id, error in session.execute(known)}


def demand_for_update(session: Session, claim: Claim, model_id: str, folder: str | None) -> None:
    """This claim's evaluation needs the model for as long as its lease holds. Raises StaleFence."""
    held(session, claim)
    row = {"model_id": model_id, "holder": claim.update_id, "until": None, "folder": folder, "error": None}
    upsert(session, EngineDemand, [row], keys=["model_id", "holder"])


def withdraw(session: Session, claim: Claim, model_id: str) -> None:
    """The evaluation is done with the model. Raises StaleFence: then it is a successor's to withdraw."""
    held(session, claim)
    session.execute(
        delete(EngineDemand).where(EngineDemand.model_id == model_id, EngineDemand.holder == claim.update_id)
    )


def problem(session: Session, model_id: str) -> str | None:
    """Why no engine runs the model, when somebody tried."""
    told = select(EngineDemand.error).where(
        EngineDemand.model_id == model_id, EngineDemand.error.is_not(None)
    )
    return session.scalars(told).first()


def report(session: Session, model_id: str, error: str | None) -> None:
    """Tell everybody who asked for the model why it does not run, or that it does."""
    session.execute(
        update(EngineDemand)
        .where(EngineDemand.model_id == model_id, EngineDemand.error.is_distinct_from(error))
        .values(error=error)
    )


def wanted_models(session: Session) -> list[WholeModel]:
    """Every whole model that must run now: what aliases name, then what evaluations and the rest need."""
    aliased_ids = select(checkpoint_id()).join(Alias, Alias.version_id == Version.id)
    models = [*_versions(session, aliased_ids), *_candidates(session)]
    demanded = select(EngineDemand.model_id).where(_live())
    models += _versions(session, demanded)
    return list({model.id: model for model in models}.values())


def let_go(session: Session, model_id: str, url: str) -> bool:
    """Whether the engine at `url` may stop: nobody wants its model any more. It is then no replica.

    Who asks for the model from now on does so after this transaction, and so does not see the replica.
    """
    # Before looking: whoever renews one of these demands waits for this transaction's end.
    ended = EngineDemand.model_id == model_id, ~func.coalesce(_live(), false())
    session.execute(delete(EngineDemand).where(*ended).execution_options(synchronize_session=False))
    if any(model.id == model_id for model in wanted_models(session)):
        return False
    session.execute(delete(Replica).where(Replica.url == url))
    return True


def _versions(session: Session, ids: Select[str | None] | Select[str]) -> list[WholeModel]:
    rows = session.execute(
        select(Version.id, Version.served_name, Assistant.base_model, Version.manifest_sha256)
        .join(Assistant, Assistant.id == Version.assistant_id)
        .where(Version.id.in_(ids), Version.kind == "full")
        .order_by(Version.created_at, Version.id)
    )
    return [WholeModel(**row._mapping, folder=None) for row in rows]


def _candidates(session: Session) -> list[WholeModel]:
    rows = session.execute(
        select(Update.id, Assistant.base_model, EngineDemand.folder)
        .join(EngineDemand, EngineDemand.model_id == Update.id)
        .join(Assistant, Assistant.id == Update.assistant_id)
        .where(_live())
        .order_by(Update.seq)
    )
    return [
        WholeModel(
            id=row.id,
            served_name=f"cand-{row.id}",
            base_model=row.base_model,
            manifest_sha256=None,
            folder=row.folder,
        )
        for row in rows
    ]


def _live() -> ColumnElement[bool]:
    holder = aliased(Update)
    leased = exists().where(
        holder.id == EngineDemand.holder,
        holder.status == Status.RUNNING,
        holder.lease_until > clock(),
    )
    return or_(EngineDemand.until > clock(), and_(EngineDemand.until.is_(None), leased))
