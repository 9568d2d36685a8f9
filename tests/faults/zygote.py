"""`python -m tests.faults.zygote`: has imported the worker and the API and forks itself on demand.

A fault test starts a thousand processes, and importing costs more than what they do. One JSON object per
line comes in, the new process's id goes out, and it begins when another line comes in:
{"role": "claim", "update": ID} works one update and ends;
{"role": "work", "seed": N} is a worker without a broker, which works whatever is to be had;
{"role": "api", "port": N} is the API. `failpoint` arms the new process, and so its trainer; `clock` sets its
wall clock ahead, in seconds.
"""

import ctypes
import json
import logging
import os
import random
import signal
import sys
import time
import traceback

import uvicorn
from sqlalchemy.exc import SQLAlchemyError

from api.app import create_app
from domain import failpoint
from domain.settings import Settings
from registry.claims import Patience
from registry.session import make_engine, make_reading_sessions, make_sessions
from registry.updates import claimable
from worker.pipeline import Pipeline

TRAINER = [sys.executable, "-S", "-m", "tests.worker_stack.trainer"]
PR_SET_PDEATHSIG = 1


def pipeline():
    settings = Settings()
    ledger = make_engine(settings.resolved_database_url)
    return Pipeline(
        settings,
        make_sessions(ledger),
        make_reading_sessions(ledger),
        trainer_command=TRAINER,
        shutdown_requested=lambda: False,
    )


def work(seed):
    """Whatever is to be had, in any order, as messages come: late, doubled, or for what another has."""
    worker, draw = pipeline(), random.Random(seed)
    patience = Patience(tries=worker.settings.update_tries, first_seconds=worker.settings.retry_seconds)
    while True:
        try:
            with worker.reads() as session:
                waiting = claimable(session, patience)
            if waiting:
                worker.run(draw.choice(waiting))
        except SQLAlchemyError:
            traceback.print_exc()
        time.sleep(0.05)


def child(order):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # else it would read our orders
    os.dup2(2, 1)
    os.environ[failpoint.VARIABLE] = order.get("failpoint", "")
    failpoint.arm(os.environ[failpoint.VARIABLE])
    if "clock" in order:
        now = time.time
        time.time = lambda: now() + order["clock"]
    match order["role"]:
        case "claim":
            pipeline().run(order["update"])
        case "work":
            work(order["seed"])
        case "api":
            uvicorn.run(create_app(), host="127.0.0.1", port=order["port"], log_level="warning")


def main():
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits: the dead are gone at once
    print("ready", flush=True)
    for line in sys.stdin:
        waits, lets_go = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(lets_go)
                os.read(waits, 1)
                os.close(waits)
                child(json.loads(line))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        print(pid, flush=True)
        sys.stdin.readline()
        os.close(lets_go)
        os.close(waits)


if __name__ == "__main__":
    main()
