"""Which versions' files may go, on both databases."""

from dataclasses import replace

import pytest
from sqlalchemy import update

from domain.errors import Conflict, NotFound
from domain.update import Status
from domain.version import Checkpoint
from registry import aliases, assistants, retention, updates, versions
from registry.retention import Policy
from registry.session import clock
from registry.tables import AliasMove, Assistant, AuditRow, ServingState, Version
from tests.unit.registry.steps import TEAM, Ledger, lines, race

LATER = Policy(keep_versions=1, grace_seconds=-1.0)
"""As if a second more than the grace had passed since everything."""


def taught(ledger: Ledger, count: int) -> Assistant:
    """An assistant with v1 to v<count>, the last of them champion."""
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    for number in range(count):
        ledger.learn(assistant, skill, lines(10 * number, 10 * number + 3))
    return assistant


def prunable(ledger: Ledger, assistant: Assistant, policy: Policy = LATER) -> list[int]:
    with ledger.begin() as session:
        ids = retention.prunable(session, policy)
        return [versions.get_version(session, assistant, version_id).number for version_id in ids]


def prune(ledger: Ledger, version: Version, policy: Policy = LATER) -> bool:
    with ledger.begin() as session:
        return retention.prune(session, version.id, policy)


def point(ledger: Ledger, assistant: Assistant, alias: str, number: int) -> None:
    with ledger.begin() as session:
        version = versions.get_version(session, assistant, number)
        aliases.move_alias(
            session, assistant, alias, version, kind="promote", reason="", actor="u", expected_revision=None
        )


def test_the_champion_its_rollback_target_and_the_newest_stay(ledger: Ledger) -> None:
    assistant = taught(ledger, 5)
    # v0 has no files; v5 is champion, v4 is where a rollback goes.
    assert prunable(ledger, assistant) == [1, 2, 3]
    assert prunable(ledger, assistant, replace(LATER, keep_versions=3)) == [1, 2]
    assert prunable(ledger, assistant, replace(LATER, keep_versions=5)) == []


def test_a_checkpoint_stays_as_long_as_an_adapter_that_lies_on_it(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    full = ledger.learn(assistant, skill, lines(0, 2), kind="full")
    below = Checkpoint(version_id=full.id, manifest_sha256="0" * 64)
    for start in (10, 20):
        ledger.learn(assistant, skill, lines(start, start + 2), checkpoint=below)
    ledger.learn(assistant, skill, lines(30, 32), kind="full")
    ledger.learn(assistant, skill, lines(40, 42), kind="full")
    # v2 and v3 lie on v1, which nobody else needs; v4 is where a rollback goes.
    assert prunable(ledger, assistant) == [2, 3]
    assert prune(ledger, ledger.version(assistant, 2))
    assert prunable(ledger, assistant) == [3]
    assert prune(ledger, ledger.version(assistant, 3))
    assert prunable(ledger, assistant) == [1]


def test_nothing_goes_within_the_grace(ledger: Ledger) -> None:
    assistant = taught(ledger, 4)
    assert prunable(ledger, assistant, Policy(keep_versions=1, grace_seconds=60)) == []


def test_an_alias_keeps_a_version(ledger: Ledger) -> None:
    assistant = taught(ledger, 4)
    point(ledger, assistant, "canary", 1)
    assert prunable(ledger, assistant) == [2]


def test_a_pin_keeps_a_version_until_it_is_taken_off(ledger: Ledger) -> None:
    assistant = taught(ledger, 4)
    version = ledger.version(assistant, 2)
    for pinned, left in ((True, [1]), (True, [1]), (False, [1, 2])):
        with ledger.begin() as session:
            retention.pin(session, version, pinned=pinned, actor="user")
        assert prunable(ledger, assistant) == left
    with ledger.begin() as session:
        actions = [row.action for row in session.query(AuditRow).order_by(AuditRow.seq)]
    assert [one for one in actions if "pin" in one] == ["version.pin", "version.unpin"]


def test_a_version_that_is_being_read_stays_for_the_grace(ledger: Ledger) -> None:
    assistant = taught(ledger, 4)
    long_ago = Policy(keep_versions=1, grace_seconds=60)
    with ledger.begin() as session:
        session.execute(update(Version).values(created_at=clock() - 120))
        # History is append-only, so the moves are left where they are: only v1 was never moved away from.
        session.execute(update(Version).where(Version.number == 1).values(used_at=clock() - 90))
    moved_from = {1, 2, 3}
    with ledger.begin() as session:
        assert {
            versions.get_version(session, assistant, row.from_version_id).number
            for row in session.query(AliasMove)
            if row.from_version_id is not None
        } >= moved_from
    # Each was champion until a moment ago: requests in flight may still be on it.
    assert prunable(ledger, assistant, long_ago) == []
    with ledger.begin() as session:
        retention.use(session, ledger.version(assistant, 1).id)
        [used_at] = session.query(Version.used_at).filter(Version.number == 1).one()
        [now] = session.query(clock()).one()
    assert 0 <= now - used_at < 30


@pytest.mark.parametrize("state", ["queued", "running", "paused"])
def test_the_parent_of_an_update_stays_until_it_ends(ledger: Ledger, state: str) -> None:
    assistant = taught(ledger, 2)
    with ledger.begin() as session:
        skill = assistants.get_skill(session, assistant, "route")
    ledger.teach(assistant, skill, lines(100, 103))
    queued = ledger.queue(assistant)
    claim = ledger.must_claim(queued)  # its parent is v2
    with ledger.begin() as session:
        if state == "queued":
            updates.release(session, claim)
        elif state == "paused":
            updates.request_pause(session, updates.get_update(session, TEAM, queued.id), actor="u")
            updates.release(session, claim)
    for number in (1, 0, 1):  # v2 is neither champion nor where a rollback goes
        point(ledger, assistant, "champion", number)
    assert ledger.read(queued).status == state
    assert 2 not in prunable(ledger, assistant, replace(LATER, keep_versions=1))
    assert not prune(ledger, ledger.version(assistant, 2))


def test_what_serves_stays_though_its_alias_moved_on(ledger: Ledger) -> None:
    assistant = taught(ledger, 4)
    with ledger.begin() as session:
        version = versions.get_version(session, assistant, 1)
        session.add(
            ServingState(
                team_id=assistant.team_id,
                assistant_id=assistant.id,
                alias="champion",
                version_id=version.id,
                updated_at=0.0,
            )
        )
    assert prunable(ledger, assistant) == [2]


def test_a_pruned_version_is_refused_by_whoever_needs_its_files(ledger: Ledger) -> None:
    assistant = taught(ledger, 4)
    version = ledger.version(assistant, 1)
    assert prune(ledger, version)
    assert not prune(ledger, version)
    with ledger.begin() as session:
        calls = (
            lambda: retention.use(session, version.id),
            lambda: retention.pin(session, version, pinned=True, actor="u"),
            lambda: aliases.roll_back(session, assistant, to=version, reason="", actor="u"),
        )
        for call in calls:
            with pytest.raises(Conflict) as caught:
                call()
            assert caught.value.code == "version_pruned"
        with pytest.raises(NotFound):
            retention.use(session, "ver_none")
    with ledger.begin() as session:
        found = {one.name: (one.pruned, one.aliases) for one in retention.version_files(session)}
        assert [row.action for row in session.query(AuditRow)].count("version.prune") == 1
    assert found == {
        "helper@v1": (True, ()),
        "helper@v2": (False, ()),
        "helper@v3": (False, ()),
        "helper@v4": (False, ("champion",)),
    }


def test_pruning_and_pointing_an_alias_never_both_happen(ledger: Ledger) -> None:
    assistant = taught(ledger, 12)
    for number in range(1, 11):
        version = ledger.version(assistant, number)
        pruned, _ = race(
            [
                lambda version=version: prune(ledger, version),
                lambda number=number: point(ledger, assistant, f"a{number}", number),
            ]
        )
        with ledger.begin() as session:
            pointed = any(alias.name == f"a{number}" for alias in aliases.list_aliases(session, assistant))
            marked = versions.get_version(session, assistant, number).pruned_at is not None
        assert pruned is marked
        assert pointed is not marked


def test_what_a_running_update_may_publish_is_needed(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    first = ledger.learn(assistant, skill, lines(0, 3))
    ledger.teach(assistant, skill, lines(10, 13))
    queued = ledger.queue(assistant)
    claim = ledger.must_claim(queued)
    with ledger.begin() as session:
        coming, _ = versions.allocate_version(session, claim)
    stale = retention.publishing_id(queued.id, claim.fence - 1)
    stored = [first.id, coming, stale, "ver_unknown"]
    with ledger.begin() as session:
        assert retention.unneeded_ids(session, stored) == [stale, "ver_unknown"]
    ledger.finish(claim, Status.CANCELLED)
    with ledger.begin() as session:
        assert retention.unneeded_ids(session, stored) == [coming, stale, "ver_unknown"]
