"""A ledger on a real database and the steps that most of these tests take."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session, sessionmaker

from domain.demonstration import Demonstration, DemonstrationLine
from domain.measurement import GateRules, Measurement, Verdict
from domain.recipe import Recipe
from domain.skill import ExactGrader
from domain.update import Status
from domain.version import Checkpoint, Manifest, VersionKind
from registry import assistants, demonstrations, updates, versions
from registry.claims import Claim, Patience
from registry.leases import DEFAULT_PATIENCE
from registry.session import make_engine, make_reading_sessions, make_sessions
from registry.tables import Assistant, DemonstrationRow, Skill, Update, Version

TEAM = "team_default"
PASS = Verdict(outcome="pass", reasons=["route rose"])
Result = TypeVar("Result")


def lines(start: int, stop: int, response: str = "r") -> list[Demonstration]:
    return [
        DemonstrationLine(prompt=f"prompt {n}", response=response).to_demonstration()
        for n in range(start, stop)
    ]


def untaught(
    session: Session, assistant: Assistant, skills: list[Skill] | None = None
) -> list[DemonstrationRow]:
    """In order of acceptance."""
    found = demonstrations.untaught(assistant, skills)
    rows = select(DemonstrationRow).join(found, found.c.id == DemonstrationRow.id)
    return list(session.scalars(rows.order_by(DemonstrationRow.seq)))


class Ledger:
    """Each step is a transaction of its own, as at the edges."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine: Engine = make_engine(url)
        self.sessions: sessionmaker[Session] = make_sessions(self.engine)
        self.reads: sessionmaker[Session] = make_reading_sessions(self.engine)

    def begin(self):  # type: ignore[no-untyped-def]
        return self.sessions.begin()

    def assistant(self, name: str = "helper") -> Assistant:
        with self.begin() as session:
            return assistants.create_assistant(
                session,
                team_id=TEAM,
                name=name,
                base_model="tiny",
                parameter_count=1000,
                context_window=2048,
                actor="user",
            )

    def skill(self, assistant: Assistant, name: str = "route", holdout_fraction: float = 0.0) -> Skill:
        with self.begin() as session:
            return assistants.create_skill(
                session,
                assistant,
                name=name,
                description="",
                grader=ExactGrader(),
                holdout_fraction=holdout_fraction,
                actor="user",
            )

    def teach(self, assistant: Assistant, skill: Skill, batch: list[Demonstration]) -> None:
        with self.begin() as session:
            demonstrations.accept_batch(session, assistant, skill, batch, actor="user")

    def queue(self, assistant: Assistant, skills: list[str] | None = None) -> Update:
        with self.begin() as session:
            return updates.create_update(
                session,
                assistant,
                skills=skills,
                recipe=Recipe(),
                gate=GateRules(),
                publish="auto",
                actor="user",
            )

    def claim(
        self,
        update_id: str,
        lease_seconds: float = 60,
        worker: str = "w",
        patience: Patience = DEFAULT_PATIENCE,
    ) -> Claim | None:
        with self.begin() as session:
            return updates.claim(
                session, update_id, worker=worker, lease_seconds=lease_seconds, patience=patience
            )

    def must_claim(self, update: Update, lease_seconds: float = 60) -> Claim:
        claim = self.claim(update.id, lease_seconds)
        assert claim is not None
        return claim

    def publish(
        self,
        claim: Claim,
        verdict: Verdict = PASS,
        measurements: list[Measurement] | None = None,
        move_champion: bool = True,
        kind: VersionKind = "adapter",
        checkpoint: Checkpoint | None = None,
    ) -> Version:
        with self.begin() as session:
            version_id, number = versions.allocate_version(session, claim)
            return versions.publish(
                session,
                claim,
                version_id=version_id,
                number=number,
                served_name=f"served-v{number}",
                manifest=Manifest(
                    kind=kind,
                    base_model="tiny",
                    update_id=claim.update_id,
                    checkpoint=checkpoint,
                    files=[],
                ),
                manifest_sha256="0" * 64,
                recipe=Recipe(),
                verdict=verdict,
                measurements=measurements or [],
                move_champion=move_champion,
            )

    def finish(self, claim: Claim, status: Status = Status.SUCCEEDED) -> Update:
        with self.begin() as session:
            return updates.finish(session, claim, status)

    def learn(
        self,
        assistant: Assistant,
        skill: Skill,
        batch: list[Demonstration],
        kind: VersionKind = "adapter",
        checkpoint: Checkpoint | None = None,
    ) -> Version:
        """From batch to champion."""
        self.teach(assistant, skill, batch)
        claim = self.must_claim(self.queue(assistant, [skill.name]))
        version = self.publish(claim, kind=kind, checkpoint=checkpoint)
        self.finish(claim)
        return version

    def version(self, assistant: Assistant, number: int) -> Version:
        with self.begin() as session:
            return versions.get_version(session, assistant, number)

    def read(self, update: Update) -> Update:
        with self.begin() as session:
            return updates.get_update(session, TEAM, update.id)


def race(calls: list) -> list:  # type: ignore[type-arg]
    """Run all calls at once, each in its own thread; results or the errors they raised, in order."""
    barrier = Barrier(len(calls))

    def start(call):  # type: ignore[no-untyped-def]
        barrier.wait(30)
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(start, calls))
