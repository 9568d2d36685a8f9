"""An update's work folder when it is no longer needed."""

import shutil
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from domain.update import FINISHED, Status
from registry.tables import Update

LOG = "trainer.log"


def remove_files(folder: Path, *, keep_log: bool) -> None:
    """Checkpoints, candidate and job; with `keep_log` the trainer's log stays for whoever asks why."""
    if not keep_log:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOG:
            path.unlink()


def remove_unfinished(folder: Path) -> None:
    """What a failed try had begun to write; whole checkpoints, candidate and scores stay for the next."""
    for pattern in ("output-*", "staging-*", "checkpoints/.staging-*", "job.json.staged"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def remove_leftovers(session: Session, work_dir: Path) -> None:
    """The files of updates that ended without a worker: cancelled while paused, queued or between claims."""
    folders = {folder.name: folder for folder in work_dir.glob("*/")}
    ended = select(Update.id, Update.status).where(Update.id.in_(folders), Update.status.in_(FINISHED))
    for update_id, status in session.execute(ended):
        remove_files(folders[update_id], keep_log=status == Status.FAILED)
