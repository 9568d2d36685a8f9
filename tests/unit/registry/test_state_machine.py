"""The registry against a model in plain Python, step by step in any order, on both databases."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from domain.demonstration import DemonstrationLine
from domain.errors import RatchetError
from domain.measurement import GateRules, Verdict
from domain.recipe import Recipe
from domain.update import Status
from registry import aliases, demonstrations, leases, updates, versions
from registry.claims import Claim, Patience
from registry.session import make_reading_sessions
from registry.tables import AliasMove, AuditRow, Skill, Update, Version
from tests.unit.registry.model import OPEN, TRIES, Model, ModelUpdate, Refused
from tests.unit.registry.steps import TEAM, Ledger
from tests.unit.registry.steps import untaught as untaught_rows

PATIENCE = Patience(tries=TRIES)
SKILLS = st.sampled_from(["one", "two"])
BATCHES = st.lists(st.integers(0, 11).map(str), min_size=1, max_size=4)
OUTCOMES = st.sampled_from(["pass", "pass", "hold", "block"])
names = count(1)


@dataclass(frozen=True)
class Outcome:
    result: Any
    refusal: str | None
    """Name of the error's class."""


def outcome(step: Callable[[], Any]) -> Outcome:
    try:
        return Outcome(step(), None)
    except Refused as error:
        return Outcome(None, error.kind)
    except RatchetError as error:
        return Outcome(None, type(error).__name__)


class Registry(RuleBasedStateMachine):
    """Every example has an assistant of its own in one database; every step is a transaction."""

    ledger: Ledger

    waiting = Bundle("waiting")
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.assistant = self.ledger.assistant(f"helper-{next(names)}")
        self.skills = {name: self.ledger.skill(self.assistant, name) for name in self.model.skills}
        self.reads = make_reading_sessions(self.ledger.engine)
        self.ids: list[str] = []

    def both(self, ours: Callable[[], Any], real: Callable[[Session], Any]) -> tuple[Any, Any]:
        """The results of a step on both sides, or one refusal that both share."""
        promised = outcome(ours)
        found = outcome(lambda: self._commit(real))
        assert promised.refusal == found.refusal
        return promised.result, found.result

    def _commit(self, verb: Callable[[Session], Any]) -> Any:
        with self.ledger.begin() as session:
            return verb(session)

    def row(self, session: Session, update: ModelUpdate) -> Update:
        return updates.get_update(session, TEAM, self.id_of(update))

    def id_of(self, update: ModelUpdate) -> str:
        return self.ids[self.model.updates.index(update)]

    @rule(skill=SKILLS, batch=BATCHES)
    def accept(self, skill: str, batch: list[str]) -> None:
        given = [DemonstrationLine(prompt=f"{skill} {one}", response="r").to_demonstration() for one in batch]
        expected, found = self.both(
            lambda: self.model.accept(skill, [f"{skill} {one}" for one in batch]),
            lambda session: demonstrations.accept_batch(
                session, self.assistant, self.skills[skill], given, actor="user"
            ),
        )
        assert (found.accepted, found.duplicates) == (expected, len(batch) - expected)

    @rule(target=waiting, skill=st.none() | SKILLS)
    def create_update(self, skill: str | None) -> Any:
        made = self._queue(skill)
        return multiple() if made is None else made

    def _queue(self, skill: str | None) -> ModelUpdate | None:
        expected, found = self.both(
            lambda: self.model.create_update(skill), lambda session: self._create(session, skill)
        )
        if expected is not None:
            self.ids.append(found[0])
            assert found[1] == expected.demonstrations
        made: ModelUpdate | None = expected
        return made

    def _create(self, session: Session, skill: str | None) -> tuple[str, set[str]]:
        row = updates.create_update(
            session,
            self.assistant,
            skills=None if skill is None else [skill],
            recipe=Recipe(),
            gate=GateRules(),
            publish="auto",
            actor="user",
        )
        taught = updates.demonstrations_of(session, row)
        return row.id, {one.body["messages"][0]["content"] for one in taught}

    @rule(target=claims, update=waiting)
    def claim(self, update: ModelUpdate) -> Any:
        held = self._take(update)
        return multiple() if held is None else held

    def _take(self, update: ModelUpdate) -> tuple[ModelUpdate, Claim] | None:
        expected, found = self.both(
            lambda: self.model.claim(update),
            lambda session: leases.claim(
                session, self.id_of(update), worker="w", lease_seconds=3600, patience=PATIENCE
            ),
        )
        assert (found and found.fence) == expected
        return None if found is None else (update, found)

    @rule(held=claims)
    def lose_the_lease(self, held: tuple[ModelUpdate, Claim]) -> None:
        """As when a worker is gone for longer than its lease."""
        if not held[0].has_worker:
            return
        held[0].leased = False
        with self.ledger.begin() as session:
            session.execute(
                text("UPDATE updates SET lease_until = 1 WHERE id = :id"), {"id": held[1].update_id}
            )

    @rule(held=claims)
    def heartbeat(self, held: tuple[ModelUpdate, Claim]) -> None:
        update, claim = held

        def ours() -> tuple[bool, bool]:
            self.model.require_held(update, claim.fence)
            update.leased = True
            return update.cancel, update.pause

        expected, found = self.both(ours, lambda session: leases.heartbeat(session, claim, 3600))
        assert expected is None or (found.cancel, found.pause) == expected

    @rule(held=claims, wanted=OUTCOMES)
    def publish(self, held: tuple[ModelUpdate, Claim], wanted: Any) -> None:
        update, claim = held
        promised = outcome(lambda: self.model.publish(update, claim.fence, wanted))
        verdict = Verdict(outcome=wanted, reasons=["so"])
        found = outcome(lambda: self.ledger.publish(claim, verdict, move_champion=wanted == "pass"))
        assert promised.refusal == found.refusal
        if found.refusal is None:
            made, told = found.result, promised.result
            assert (made.number, made.verdict["outcome"]) == (told.number, told.outcome)

    @rule(
        target=claims,
        skill=SKILLS,
        new=st.integers(12, 60).map(str),
        wanted=OUTCOMES,
        away=st.booleans(),
        asked=st.sampled_from([None, None, None, "cancel", "pause"]),
    )
    def learn(self, skill: str, new: str, wanted: Any, away: bool, asked: str | None) -> Any:
        """From a batch to a version in one step, where nothing is in the way. Rare by chance."""
        self.accept(skill, [new])
        if not self.model.untaught()[skill] or any(one.status in OPEN for one in self.model.updates):
            return multiple()
        update = self._queue(skill)
        assert update is not None
        held = self._take(update)
        assert held is not None
        if away:  # the champion leaves while the update runs
            self.roll_back(None)
        if asked is not None:
            self.ask(update, asked)
        self.publish(held, wanted)
        self.finish(held, Status.SUCCEEDED)
        return held

    @rule(held=claims, status=st.sampled_from([Status.SUCCEEDED, Status.FAILED]))
    def finish(self, held: tuple[ModelUpdate, Claim], status: Status) -> None:
        update, claim = held
        self.both(
            lambda: self.model.finish(update, claim.fence, status.value),
            lambda session: leases.finish(session, claim, status),
        )

    @rule(held=claims)
    def release(self, held: tuple[ModelUpdate, Claim]) -> None:
        update, claim = held
        self.both(
            lambda: self.model.release(update, claim.fence), lambda session: leases.release(session, claim)
        )

    @rule(update=waiting, verb=st.sampled_from(["cancel", "pause", "resume"]))
    def ask(self, update: ModelUpdate, verb: str) -> None:
        ours = {"cancel": self.model.cancel, "pause": self.model.request_pause, "resume": self.model.resume}
        real = {"cancel": updates.request_cancel, "pause": updates.request_pause, "resume": updates.resume}
        self.both(
            lambda: ours[verb](update),
            lambda session: real[verb](session, self.row(session, update), "user"),
        )

    @rule(
        alias=st.sampled_from(["champion", "canary"]),
        version=st.integers(0, 5),
        off=st.sampled_from([None, 0, 0, 1, -1]),
        force=st.booleans(),
    )
    def move(self, alias: str, version: int, off: int | None, force: bool) -> None:
        if version >= len(self.model.versions):
            return
        expected = None if off is None else max(self.model.aliases.get(alias, (0, 0))[1] + off, 0)
        self.both(
            lambda: self.model.move(alias, version, expected, force),
            lambda session: aliases.move_alias(
                session,
                self.assistant,
                alias,
                versions.get_version(session, self.assistant, version),
                kind="promote",
                reason="",
                actor="user",
                expected_revision=expected,
                force=force,
            ),
        )

    @rule(to=st.none() | st.integers(0, 5))
    def roll_back(self, to: int | None) -> None:
        if to is None or to < len(self.model.versions):
            self.both(
                lambda: self.model.roll_back(to),
                lambda session: aliases.roll_back(
                    session,
                    self.assistant,
                    to=None if to is None else versions.get_version(session, self.assistant, to),
                    reason="",
                    actor="user",
                ),
            )

    @invariant()
    def the_same_state(self) -> None:
        model, own = self.model, self.assistant.id
        with self.reads() as session:
            numbers = dict(
                session.execute(select(Version.id, Version.number).where(Version.assistant_id == own)).all()
            )
            assert sorted(numbers.values()) == [one.number for one in model.versions]
            rows = {row.id: row for row in session.scalars(select(Update).where(Update.assistant_id == own))}
            for id, update in zip(self.ids, model.updates, strict=True):
                row = rows.pop(id)
                assert (row.status, row.fence, row.cancel_requested, row.pause_requested) == (
                    (update.status, update.fence, update.cancel, update.pause)
                )
                assert numbers.get(row.version_id) == update.version
                assert numbers.get(row.parent_version_id) == update.parent
            assert rows == {}
            pointers = {
                alias.name: (numbers[alias.version_id], alias.revision)
                for alias in aliases.list_aliases(session, self.assistant)
            }
            assert pointers == model.aliases
            line = aliases.champion_line(session, self.assistant, newest=1000)
            assert [version.number for version in line] == model.line
            before = aliases.rollback_target(session, self.assistant)
            assert before == (line[-2].id if len(line) > 1 else None)
            assert aliases.champion_line(session, self.assistant, newest=2) == line[-2:]
            untaught = {name: set() for name in model.skills}
            for row in untaught_rows(session, self.assistant):
                name = next(name for name, skill in self.skills.items() if skill.id == row.skill_id)
                untaught[name].add(row.body["messages"][0]["content"])
            assert untaught == model.untaught()
            counted = session.execute(
                select(Skill.name, Skill.train_demonstrations).where(Skill.assistant_id == own)
            )
            assert dict(counted.all()) == {name: len(known) for name, known in model.skills.items()}
            moves = select(AliasMove.id).where(AliasMove.assistant_id == own)
            audited = select(func.count()).where(
                AuditRow.action == "alias.move", AuditRow.object_id.in_(moves)
            )
            assert session.scalar(audited) == sum(revision for _, revision in model.aliases.values())


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_registry_does_what_the_model_does(ledger: Ledger) -> None:
    machine = type("RegistryOnThis", (Registry,), {"ledger": ledger})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=50,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
