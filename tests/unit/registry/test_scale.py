"""What a request costs does not grow with what the ledger holds: nothing is scanned, or sorted as a whole.

Counted, not timed: the steps of SQLite's virtual machine, and PostgreSQL's plans.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from domain.measurement import GateRules
from domain.recipe import Recipe
from registry import aliases, assistants, audit, demonstrations, measurements, overview, updates, versions
from registry.tables import Assistant, Skill
from tests.conftest_databases import NewDatabase
from tests.unit.registry.steps import TEAM, Ledger, lines
from tests.unit.registry.test_measurements import measured

FEW, MANY = 6, 24
"""Versions, each of an update of PER_UPDATE demonstrations and with two measurements."""
PER_UPDATE = 12
PAGE = 3
Work = Callable[[Session, Assistant, Skill], object]


def create_update(session: Session, assistant: Assistant, _skill: Skill) -> object:
    return updates.create_update(
        session, assistant, skills=None, recipe=Recipe(), gate=GateRules(), publish="auto", actor="user"
    )


def accept_batch(session: Session, assistant: Assistant, skill: Skill) -> object:
    return demonstrations.accept_batch(session, assistant, skill, lines(10**6, 10**6 + 3), actor="user")


def move_back(session: Session, assistant: Assistant, _skill: Skill) -> object:
    return aliases.roll_back(session, assistant, to=None, reason="", actor="user")


def evaluations(session: Session, assistant: Assistant, _skill: Skill) -> object:
    first = measurements.page_measurements(session, assistant, None, None, PAGE).rows[-1]
    return measurements.page_measurements(session, assistant, None, first.id, PAGE)


def dashboard(session: Session, assistant: Assistant, _skill: Skill) -> object:
    [seen] = overview.overviews(session, [assistant])
    shown = overview.shown_versions(session, assistant, seen.wanted, newest=PAGE)
    return (
        overview.skill_overviews(session, assistant),
        overview.newest_updates(session, assistant, limit=PAGE),
        overview.newest_moves(session, assistant, limit=PAGE),
        overview.taught_skills(session, assistant, shown),
        measurements.matrix(session, assistant, shown),
        aliases.rollback_target(session, assistant),
        versions.lineage_numbers(session, seen.wanted, newest=PAGE),
    )


WORK: dict[str, Work] = {
    "accept a batch": accept_batch,
    "create an update": create_update,
    "roll back": move_back,
    "evaluations": evaluations,
    "dashboard": dashboard,
    "assistants": lambda session, _, __: assistants.list_assistants(session, TEAM, None, PAGE),
    "demonstrations": lambda session, _, skill: demonstrations.list_demonstrations(
        session, skill, None, PAGE, "train"
    ),
    "versions": lambda session, assistant, _: versions.list_versions(session, assistant, None, PAGE),
    "updates": lambda session, assistant, _: updates.list_updates(session, assistant, None, PAGE),
    "history": lambda session, assistant, _: aliases.history(session, assistant, "champion", None, PAGE),
    "audit": lambda session, _, __: audit.list_audit(session, TEAM, None, PAGE),
    "dispatcher": lambda session, _, __: updates.claimable(session),
}


def grow(ledger: Ledger, assistant: Assistant, skill: Skill, start: int, stop: int) -> None:
    for number in range(start, stop):
        made = ledger.learn(assistant, skill, lines(PER_UPDATE * number, PER_UPDATE * (number + 1)))
        with ledger.begin() as session:
            for suite in ("route", "other"):
                measurements.save_measurement(session, made, measured(suite, {"a": 1}))
    # What is still to be taught, as much at every size.
    ledger.teach(assistant, skill, lines(-PAGE * stop, -PAGE * stop + PAGE))


@contextmanager
def tried(ledger: Ledger) -> Iterator[Session]:
    session = ledger.sessions()
    try:
        yield session
    finally:
        session.rollback()
        session.close()


def steps(ledger: Ledger, assistant: Assistant, skill: Skill, work: Work) -> int:
    """Virtual machine steps, in tens."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    with tried(ledger) as session:
        raw: Any = session.connection().connection.dbapi_connection
        raw.set_progress_handler(count, 10)
        work(session, assistant, skill)
        raw.set_progress_handler(None, 0)
    return counted


def test_what_a_request_costs_does_not_grow(new_sqlite: NewDatabase) -> None:
    ledger = Ledger(new_sqlite(True))
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    grow(ledger, assistant, skill, 0, FEW)
    few = {name: steps(ledger, assistant, skill, work) for name, work in WORK.items()}
    grow(ledger, assistant, skill, FEW, MANY)
    many = {name: steps(ledger, assistant, skill, work) for name, work in WORK.items()}
    ledger.engine.dispose()
    assert all(few.values()), "work without a step: the counter misses it"
    grown = {name: (few[name], many[name]) for name in WORK if many[name] > 1.1 * few[name] + 5}
    assert grown == {}


def test_an_index_answers_every_statement(new_postgresql: NewDatabase) -> None:
    ledger = Ledger(new_postgresql(True))
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    grow(ledger, assistant, skill, 0, FEW)
    asked: list[tuple[str, Any]] = []

    def keep(
        _connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool
    ) -> None:
        if statement.startswith(("SELECT", "INSERT", "UPDATE", "WITH")) and not many:
            asked.append((statement, parameters))

    scans = {}
    for name, work in WORK.items():
        with tried(ledger) as session:
            asked.clear()
            event.listen(ledger.engine, "before_cursor_execute", keep)
            work(session, assistant, skill)
            event.remove(ledger.engine, "before_cursor_execute", keep)
            # A table of few rows is scanned as that is quicker; where it is discouraged, only what has no
            # other way.
            connection = session.connection()
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            for statement, parameters in list(asked):
                plan = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars().all()
                if any("Seq Scan" in line for line in plan):
                    scans[f"{name}: {statement}"] = plan
        assert asked, name
    ledger.engine.dispose()
    assert scans == {}
