"""What a fine-tuning job leaves when it has succeeded: a file with a line of metrics per optimizer step."""

import csv
import io

from sqlalchemy import select
from sqlalchemy.orm import Session

from domain.training import StepLine
from registry import files
from registry.tables import Event, FineTuningJob, Update

FILENAME = "step_metrics.csv"
COLUMNS = {
    "step": "step",
    "loss": "train_loss",
    "teacher_kl": "teacher_kl",
    "rehearsal_kl": "rehearsal_kl",
    "base_kl": "base_kl",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "response_tokens": "response_tokens",
    "truncated_share": "truncated_share",
    "tokens": "tokens",
}
"""Field of StepLine -> name in the file, OpenAI's where it has one."""


def keep_metrics(session: Session, update: Update) -> None:
    """Write the metrics of the update's job, if a job asked for it, in the transaction that ends it."""
    job = session.scalars(select(FineTuningJob).where(FineTuningJob.update_id == update.id)).one_or_none()
    if job is None:
        return
    file = files.create_file(
        session,
        team_id=update.team_id,
        filename=FILENAME,
        purpose="fine-tune-results",
        content=_csv(_steps(session, update)).encode(),
        actor="worker",
    )
    job.result_file = file.id


def _steps(session: Session, update: Update) -> list[StepLine]:
    """In order; of a step that was done again after an interruption, what was trained on in the end."""
    rows = select(Event.data).where(Event.update_id == update.id, Event.type == "metrics")
    lines = [StepLine.model_validate(data) for data in session.scalars(rows.order_by(Event.seq))]
    by_step = {line.step: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def _csv(steps: list[StepLine]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS.values())
    for line in steps:
        writer.writerow([getattr(line, field) for field in COLUMNS])
    return text.getvalue()
