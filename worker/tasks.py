"""Celery tasks: shells around the pipeline."""

from worker.app import app
from worker.pipeline import Pipeline


@app.task(name="worker.run_update")  # type: ignore[untyped-decorator]
def run_update(update_id: str) -> None:
    Pipeline.from_settings().run(update_id)
