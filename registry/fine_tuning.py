"""Fine-tuning jobs: updates that were asked for in OpenAI's words.

State, events, version and figures are the update's; a job adds which files it came from and what its client
wrote on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from domain.errors import NotFound
from domain.ids import new_id
from registry import audit
from registry.paging import Page, read_page
from registry.session import db_now
from registry.tables import Event, File, FineTuningJob, Update


def create_job(
    session: Session,
    update: Update,
    *,
    training_file: File,
    validation_file: File | None,
    suffix: str | None,
    labels: Mapping[str, str],
    actor: str,
) -> FineTuningJob:
    job = FineTuningJob(
        id=new_id("ftjob"),
        team_id=update.team_id,
        update_id=update.id,
        training_file=training_file.id,
        validation_file=None if validation_file is None else validation_file.id,
        suffix=suffix,
        labels=dict(labels),
        created_at=db_now(session),
    )
    session.add(job)
    session.flush()
    audit.record(
        session,
        team_id=job.team_id,
        actor=actor,
        action="fine_tuning_job.create",
        object_id=job.id,
        data={
            "update": update.id,
            "training_file": job.training_file,
            "training_sha256": training_file.sha256,
            "validation_file": job.validation_file,
        },
    )
    return job


def get_job(session: Session, team_id: str, id: str) -> FineTuningJob:
    """Raises NotFound, also for another team's job."""
    job = session.scalars(
        select(FineTuningJob).where(FineTuningJob.team_id == team_id, FineTuningJob.id == id)
    ).one_or_none()
    if job is None:
        raise NotFound(f"There is no fine-tuning job '{id}'.", param="fine_tuning_job_id")
    return job


def list_jobs(
    session: Session, team_id: str, after: str | None, limit: int, labels: Mapping[str, str] | None = None
) -> Page[FineTuningJob]:
    """Newest first; with `labels`, only jobs that carry all of them."""
    rows = select(FineTuningJob).where(FineTuningJob.team_id == team_id)
    for key, value in (labels or {}).items():
        rows = rows.where(_carries(session, key, value))
    return read_page(
        session,
        rows,
        key=FineTuningJob.id,
        order=[FineTuningJob.seq],
        after=after,
        limit=limit,
        newest_first=True,
    )


def _carries(session: Session, key: str, value: str) -> ColumnElement[bool]:
    """Compares decoded keys: a JSON path would miss one with a quote, a backslash or beyond ASCII."""
    each = func.json_each if session.get_bind().dialect.name == "sqlite" else func.json_each_text
    pair = each(FineTuningJob.labels).table_valued("key", "value")
    return select(pair.c.key).where(pair.c.key == key, pair.c.value == value).exists()


def updates_of(session: Session, jobs: Sequence[FineTuningJob]) -> dict[str, Update]:
    """The jobs' updates by their ids."""
    ids = [job.update_id for job in jobs]
    return {row.id: row for row in session.scalars(select(Update).where(Update.id.in_(ids)))}


@dataclass(frozen=True)
class Progress:
    """How far the training of an update has come."""

    tokens: int
    """Of all steps so far, those included that were done again after an interruption."""
    finish_at: float
    """Unix seconds at which the newest step expected training to end."""


def progress_of(session: Session, update_ids: Sequence[str]) -> dict[str, Progress]:
    """By update; one without a step has no entry."""
    totals = session.execute(
        select(
            Event.update_id, func.sum(Event.data["tokens"].as_integer()), func.max(Event.id).label("newest")
        )
        .where(Event.update_id.in_(update_ids), Event.type == "metrics")
        .group_by(Event.update_id)
    ).all()
    newest = {
        event.id: event
        for event in session.scalars(select(Event).where(Event.id.in_([row.newest for row in totals])))
    }
    return {
        update_id: Progress(
            tokens=tokens or 0,
            finish_at=newest[last].created_at + newest[last].data["eta_seconds"],
        )
        for update_id, tokens, last in totals
    }
