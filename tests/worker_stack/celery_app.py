"""The worker's Celery app with the stand-in trainer in place of the real one.

STANDIN_S3_SECONDS is how long the worker is patient with an object store, in place of a minute.
"""

import os
import sys
from datetime import timedelta

from worker.app import app
from worker.pipeline import Pipeline

app.conf.include = []

if "STANDIN_S3_SECONDS" in os.environ:
    from artifacts import object_store

    object_store.PATIENCE = object_store.READ_TIMEOUT = timedelta(
        seconds=float(os.environ["STANDIN_S3_SECONDS"])
    )


@app.task(name="worker.run_update")
def run_update(update_id):
    Pipeline.from_settings([sys.executable, "-m", "tests.worker_stack.trainer"]).run(update_id)
