"""The worker's Celery app with the stand-in trainer in place of the real one."""

import sys

from worker.app import app
from worker.pipeline import Pipeline

app.conf.include = []


@app.task(name="worker.run_update")
def run_update(update_id):
    Pipeline.from_settings([sys.executable, "-m", "tests.worker_stack.trainer"]).run(update_id)
