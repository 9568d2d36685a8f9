from itertools import pairwise

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from domain.errors import Conflict, InvalidInput, NotFound, NothingToRollBackTo, RevisionMismatch
from domain.measurement import Verdict
from registry import aliases, audit, versions
from registry.tables import AliasMove, Assistant, Version
from tests.unit.registry.steps import TEAM, Ledger, lines, race


@pytest.fixture
def assistant(ledger: Ledger) -> Assistant:
    """With v0 to v3, each the champion in turn."""
    made = ledger.assistant()
    skill = ledger.skill(made)
    for n in range(3):
        ledger.learn(made, skill, lines(n, n + 1))
    return made


def move(
    ledger: Ledger,
    assistant: Assistant,
    number: int,
    alias: str = "champion",
    expected: int | None = None,
    force: bool = False,
) -> AliasMove:
    with ledger.begin() as session:
        return aliases.move_alias(
            session,
            assistant,
            alias,
            versions.get_version(session, assistant, number),
            kind="promote",
            reason="because",
            actor="user",
            expected_revision=expected,
            force=force,
        )


def back(ledger: Ledger, assistant: Assistant, to: int | None = None) -> int:
    """The number that champion came to point at."""
    with ledger.begin() as session:
        target = None if to is None else versions.get_version(session, assistant, to)
        made = aliases.roll_back(session, assistant, to=target, reason="worse", actor="user")
        assert made.kind == "rollback"
        assert aliases.get_alias(session, assistant, "champion").version_id == made.to_version_id
        return session.get_one(Version, made.to_version_id).number


def blocked(ledger: Ledger, assistant: Assistant) -> int:
    skill = ledger.skill(assistant, "blocked")
    ledger.teach(assistant, skill, lines(80, 81))
    claim = ledger.must_claim(ledger.queue(assistant, ["blocked"]))
    version = ledger.publish(
        claim, Verdict(outcome="block", reasons=["route fell by 0.4"]), move_champion=False
    )
    ledger.finish(claim)
    return version.number


def test_a_move_is_recorded_and_audited(ledger: Ledger, assistant: Assistant) -> None:
    made = move(ledger, assistant, 1, expected=4)
    with ledger.begin() as session:
        page = aliases.history(session, assistant, "champion", None, 2)
        number = {v.id: v.number for v in versions.list_versions(session, assistant, None, 9).rows}
        assert page.has_more
        assert [
            (m.revision, m.kind, number[m.from_version_id], number[m.to_version_id]) for m in page.rows
        ] == [(5, "promote", 3, 1), (4, "publish", 2, 3)]
        rest = aliases.history(session, assistant, "champion", page.rows[-1].id, 10)
        assert ([m.revision for m in rest.rows], rest.has_more) == ([3, 2, 1], False)
        logged = audit.list_audit(session, TEAM, None, 100).rows[-1]
        assert (logged.action, logged.object_id, logged.data["reason"]) == ("alias.move", made.id, "because")
        assert (logged.data["revision"], logged.data["forced"]) == (5, False)


def test_an_alias_is_created_by_its_first_move(ledger: Ledger, assistant: Assistant) -> None:
    first = move(ledger, assistant, 2, "canary", expected=0)
    assert (first.revision, first.from_version_id) == (1, None)
    with pytest.raises(RevisionMismatch):
        move(ledger, assistant, 1, "canary", expected=0)
    with ledger.begin() as session:
        assert [alias.name for alias in aliases.list_aliases(session, assistant)] == ["champion", "canary"]
        with pytest.raises(NotFound):
            aliases.get_alias(session, assistant, "stable")
        with pytest.raises(NotFound):
            aliases.history(session, assistant, "stable", None, 5)


def test_a_move_to_where_it_is_changes_nothing(ledger: Ledger, assistant: Assistant) -> None:
    assert move(ledger, assistant, 3).revision == 4
    with ledger.begin() as session:
        assert len(aliases.history(session, assistant, "champion", None, 10).rows) == 4


@pytest.mark.parametrize("expected", [0, 3, 5])
def test_another_revision_than_expected_moves_nothing(
    ledger: Ledger, assistant: Assistant, expected: int
) -> None:
    with pytest.raises(RevisionMismatch):
        move(ledger, assistant, 1, expected=expected)
    with ledger.begin() as session:
        assert aliases.get_alias(session, assistant, "champion").revision == 4


@pytest.mark.parametrize(("alias", "expected"), [("champion", 4), ("canary", 0)])
def test_of_many_moves_from_one_revision_one_wins(
    ledger: Ledger, assistant: Assistant, alias: str, expected: int
) -> None:
    results = race([lambda n=n: move(ledger, assistant, n % 3, alias, expected) for n in range(6)])
    assert sum(isinstance(result, RevisionMismatch) for result in results) == 5, results
    with ledger.begin() as session:
        history = aliases.history(session, assistant, alias, None, 50).rows
        assert [m.revision for m in history] == list(range(expected + 1, 0, -1))
        assert aliases.get_alias(session, assistant, alias).version_id == history[0].to_version_id


def test_moves_at_once_without_an_expectation_form_one_chain(ledger: Ledger, assistant: Assistant) -> None:
    race([lambda n=n: move(ledger, assistant, n % 4) for n in range(8)])
    with ledger.begin() as session:
        history = aliases.history(session, assistant, "champion", None, 50).rows[::-1]
        assert [m.revision for m in history] == list(range(1, len(history) + 1))
        for before, after in pairwise(history):
            assert after.from_version_id == before.to_version_id


def test_names_that_look_like_versions_and_other_assistants_versions(
    ledger: Ledger, assistant: Assistant
) -> None:
    with pytest.raises(InvalidInput):
        move(ledger, assistant, 1, "v7")
    other = ledger.version(ledger.assistant("other"), 0)
    with pytest.raises(NotFound), ledger.begin() as session:
        aliases.move_alias(
            session,
            assistant,
            "champion",
            other,
            kind="promote",
            reason="",
            actor="user",
            expected_revision=None,
        )
    with pytest.raises(IntegrityError), ledger.begin() as session:
        session.execute(text("UPDATE aliases SET version_id = :id WHERE name = 'champion'"), {"id": other.id})


def test_a_blocked_version_needs_force(ledger: Ledger, assistant: Assistant) -> None:
    number = blocked(ledger, assistant)
    with pytest.raises(Conflict, match=r"route fell by 0\.4") as caught:
        move(ledger, assistant, number)
    assert caught.value.code == "version_blocked"
    with pytest.raises(Conflict):
        back(ledger, assistant, to=number)
    move(ledger, assistant, number, force=True)
    move(ledger, assistant, 1, force=True)
    with ledger.begin() as session:
        logged = audit.list_audit(session, TEAM, None, 100).rows[-2:]
        assert [row.data["forced"] for row in logged] == [True, False]
    assert back(ledger, assistant) == number


def test_rolling_back_again_and_again_walks_to_the_base(ledger: Ledger, assistant: Assistant) -> None:
    assert [back(ledger, assistant) for _ in range(3)] == [2, 1, 0]
    with pytest.raises(NothingToRollBackTo):
        back(ledger, assistant)
    with ledger.begin() as session:
        assert aliases.get_alias(session, assistant, "champion").revision == 7


def test_nothing_to_roll_back_to_on_the_base(ledger: Ledger) -> None:
    with pytest.raises(NothingToRollBackTo):
        back(ledger, ledger.assistant())


def test_what_was_rolled_away_from_is_not_come_back_to(ledger: Ledger, assistant: Assistant) -> None:
    assert back(ledger, assistant) == 2
    skill = ledger.skill(assistant, "new")
    assert ledger.learn(assistant, skill, lines(50, 51)).number == 4
    assert [back(ledger, assistant) for _ in range(3)] == [2, 1, 0]


def test_a_promotion_of_an_earlier_version_is_undone_by_rolling_back(
    ledger: Ledger, assistant: Assistant
) -> None:
    move(ledger, assistant, 1)
    assert [back(ledger, assistant) for _ in range(4)] == [3, 2, 1, 0]


def test_rolling_back_to_a_named_version_drops_those_in_between(ledger: Ledger, assistant: Assistant) -> None:
    assert back(ledger, assistant, to=1) == 1
    assert back(ledger, assistant) == 0
    with pytest.raises(NothingToRollBackTo):
        back(ledger, assistant, to=0)


def test_rolling_to_a_version_outside_the_line_can_be_undone(ledger: Ledger, assistant: Assistant) -> None:
    assert back(ledger, assistant, to=1) == 1
    assert back(ledger, assistant, to=3) == 3
    assert [back(ledger, assistant) for _ in range(2)] == [1, 0]


@pytest.mark.parametrize("verb", ["UPDATE alias_moves SET reason = 'x'", "DELETE FROM alias_moves"])
def test_history_cannot_be_changed(ledger: Ledger, assistant: Assistant, verb: str) -> None:
    with pytest.raises(DBAPIError, match="append-only"), ledger.begin() as session:
        session.execute(text(verb))
    with ledger.begin() as session:
        assert len(aliases.history(session, assistant, "champion", None, 10).rows) == 4
