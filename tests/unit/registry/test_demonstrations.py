import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import event, func, select

from domain.demonstration import DemonstrationLine
from domain.errors import InvalidInput
from registry import aliases, demonstrations, updates
from registry.tables import AuditRow, Batch, DemonstrationRow, Skill
from tests.unit.registry.steps import Ledger, lines, race, untaught


def accept(ledger: Ledger, assistant, skill, batch):  # type: ignore[no-untyped-def]
    with ledger.begin() as session:
        return demonstrations.accept_batch(session, assistant, skill, batch, actor="user")


def counts(session, skill) -> dict[str, int]:  # type: ignore[no-untyped-def]
    """Stored demonstrations by split, counted; the skill's own count must agree."""
    rows = session.execute(
        select(DemonstrationRow.split, func.count())
        .where(DemonstrationRow.skill_id == skill.id)
        .group_by(DemonstrationRow.split)
    )
    counted = {"train": 0, "holdout": 0} | {split: count for split, count in rows}
    kept = session.get(Skill, skill.id)
    assert counted == {"train": kept.train_demonstrations, "holdout": kept.holdout_demonstrations}
    return counted


def test_duplicates_within_the_batch_and_against_the_skill_are_left_out(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    first = accept(ledger, assistant, skill, [*lines(0, 4), *lines(1, 3)])
    assert (first.accepted, first.duplicates, first.train, first.holdout) == (4, 2, 4, 0)
    second = accept(ledger, assistant, skill, [*lines(3, 6), *lines(0, 1, response="other")])
    assert (second.accepted, second.duplicates) == (3, 1)
    with ledger.begin() as session:
        rows = demonstrations.list_demonstrations(session, skill, None, 100).rows
        taught = [(row.body["messages"][0]["content"], row.body["response"]) for row in rows]
    assert taught == [(f"prompt {n}", "r") for n in range(6)] + [("prompt 0", "other")]


def test_metadata_alone_does_not_make_a_demonstration_new(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    line = DemonstrationLine(prompt="prompt 0", response="r", metadata={"by": "ann"}).to_demonstration()
    result = accept(ledger, assistant, skill, [line, *lines(0, 1)])
    assert (result.accepted, result.duplicates) == (1, 1)


def test_the_same_content_in_another_skill_is_new(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    for name in ("one", "two"):
        assert accept(ledger, assistant, ledger.skill(assistant, name), lines(0, 2)).accepted == 2


def test_an_empty_batch_is_refused_and_one_of_duplicates_is_not(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    with pytest.raises(InvalidInput):
        accept(ledger, assistant, skill, [])
    accept(ledger, assistant, skill, lines(0, 2))
    again = accept(ledger, assistant, skill, lines(0, 2))
    assert (again.accepted, again.duplicates) == (0, 2)


def test_a_share_is_held_out_by_prompt(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant, holdout_fraction=0.5)
    batch = lines(0, 40)
    # First four bytes of the prompt's hash below half of their range.
    expected = {n for n, line in enumerate(batch) if line.prompt_hash()[0] in "01234567"}
    result = accept(ledger, assistant, skill, batch)
    assert (result.train, result.holdout) == (40 - len(expected), len(expected))
    assert 0 < len(expected) < 40
    # The same prompts with new responses fall on the same sides.
    accept(ledger, assistant, skill, lines(0, 40, response="other"))
    with ledger.begin() as session:
        held = demonstrations.holdout_items(session, skill)
        prompts = [row.body["messages"][0]["content"] for row in held]
        assert sorted(prompts) == sorted(2 * [f"prompt {n}" for n in expected])
        assert counts(session, skill) == {
            "train": 2 * (40 - len(expected)),
            "holdout": 2 * len(expected),
        }
        page = demonstrations.list_demonstrations(session, skill, held[0].id, 3, split="holdout")
        assert [row.id for row in page.rows] == [row.id for row in held[1:4]]
        assert page.has_more


def test_the_number_of_statements_does_not_grow_with_the_batch(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    statements: list[str] = []
    event.listen(ledger.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    counted = []
    for batch in (lines(0, 2), lines(2, 1500)):
        statements.clear()
        accept(ledger, assistant, skill, batch)
        counted.append(len(statements))
    assert counted[0] == counted[1]


def test_more_hashes_than_one_statement_takes(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    accept(ledger, assistant, skill, lines(0, 10))
    monkeypatch.setattr(demonstrations, "HASHES_PER_QUERY", 3)
    result = accept(ledger, assistant, skill, lines(0, 12))
    assert (result.accepted, result.duplicates) == (2, 10)


def test_a_batch_that_is_rolled_back_leaves_nothing(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    with ledger.begin() as session:
        before = session.scalar(select(func.count()).select_from(AuditRow))
    session = ledger.sessions()
    demonstrations.accept_batch(session, assistant, skill, lines(0, 5), actor="user")
    session.rollback()
    session.close()
    with ledger.begin() as session:
        for table in (Batch, DemonstrationRow):
            assert session.scalar(select(func.count()).select_from(table)) == 0
        assert session.scalar(select(func.count()).select_from(AuditRow)) == before


def test_overlapping_batches_at_once_are_counted_once(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    results = race([lambda n=n: accept(ledger, assistant, skill, lines(5 * n, 5 * n + 20)) for n in range(6)])
    assert sum(result.accepted for result in results) == 45
    assert sum(result.duplicates for result in results) == 6 * 20 - 45
    with ledger.begin() as session:
        assert counts(session, skill) == {"train": 45, "holdout": 0}


WRITER = """
import sys
from registry.session import make_engine, make_sessions
from registry import assistants, demonstrations
from tests.unit.registry.steps import TEAM, lines
sessions = make_sessions(make_engine(sys.argv[1]))
for n in range(10_000):
    with sessions.begin() as session:
        assistant = assistants.get_assistant(session, TEAM, "helper")
        skill = assistants.get_skill(session, assistant, "route")
        batch = lines(3 * n, 3 * n + 3)
        demonstrations.accept_batch(session, assistant, skill, batch, actor="user")
    print(n, flush=True)
"""


def test_acknowledged_batches_survive_the_death_of_the_writer(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, ledger.url],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(25)]
    writer.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout.read().split()]
    writer.wait(30)
    writer.stdout.close()
    with ledger.begin() as session:
        rows = demonstrations.list_demonstrations(session, skill, None, 100_000).rows
        prompts = [row.body["messages"][0]["content"] for row in rows]
    # Whole batches, each once, in order; at most the one in flight beyond what was acknowledged.
    assert prompts == [f"prompt {n}" for n in range(len(prompts))]
    assert len(prompts) in (3 * len(acknowledged), 3 * len(acknowledged) + 3)


def names(rows) -> list[str]:  # type: ignore[no-untyped-def]
    return [row.body["messages"][0]["content"] for row in rows]


def untaught_prompts(session, assistant, skills=None) -> list[str]:  # type: ignore[no-untyped-def]
    return names(untaught(session, assistant, skills))


def test_untaught_follows_updates_and_the_champions_lineage(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill, other = ledger.skill(assistant), ledger.skill(assistant, "other", holdout_fraction=1.0)

    def waiting(skills=None) -> list[str]:  # type: ignore[no-untyped-def]
        with ledger.begin() as session:
            return untaught_prompts(session, assistant, skills)

    ledger.teach(assistant, skill, lines(0, 2))
    ledger.teach(assistant, other, lines(50, 60))
    assert waiting() == ["prompt 0", "prompt 1"]
    assert waiting([other]) == []

    cancelled = ledger.queue(assistant)
    assert waiting() == []
    with ledger.begin() as session:
        updates.request_cancel(session, cancelled, "user")
    assert waiting() == ["prompt 0", "prompt 1"]

    paused = ledger.queue(assistant)
    with ledger.begin() as session:
        updates.request_pause(session, paused, "user")
    assert waiting() == []
    with ledger.begin() as session:
        updates.resume(session, paused, "user")
    claim = ledger.must_claim(paused)
    assert waiting() == []
    ledger.publish(claim)
    ledger.finish(claim)
    assert waiting() == []

    ledger.learn(assistant, skill, lines(2, 4))
    assert waiting() == []
    with ledger.begin() as session:
        aliases.roll_back(session, assistant, to=None, reason="", actor="user")
    assert waiting() == ["prompt 2", "prompt 3"]
    with ledger.begin() as session:
        aliases.roll_back(session, assistant, to=None, reason="", actor="user")
    assert waiting([skill]) == ["prompt 0", "prompt 1", "prompt 2", "prompt 3"]


def test_what_an_earlier_version_was_taught_stays_taught_when_it_serves_again(ledger: Ledger) -> None:
    """Its demonstrations were taken by a later update meanwhile, whose version is on another line."""
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    first = ledger.learn(assistant, skill, lines(0, 2))
    with ledger.begin() as session:
        aliases.roll_back(session, assistant, to=None, reason="", actor="user")
    second = ledger.learn(assistant, skill, lines(2, 3))
    assert second.parent_id != first.id
    for serving, waiting in ((first, ["prompt 2"]), (second, []), (first, ["prompt 2"])):
        with ledger.begin() as session:
            aliases.move_alias(
                session,
                assistant,
                "champion",
                serving,
                kind="promote",
                reason="",
                actor="user",
                expected_revision=None,
            )
            assert untaught_prompts(session, assistant) == waiting
    # Both versions' updates took the first two; the next one takes what is left.
    update = ledger.queue(assistant)
    with ledger.begin() as session:
        assert names(updates.demonstrations_of(session, update)) == ["prompt 2"]


def test_what_a_blocked_version_was_taught_is_untaught(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    ledger.teach(assistant, skill, lines(0, 2))
    claim = ledger.must_claim(ledger.queue(assistant))
    ledger.publish(claim, move_champion=False)
    ledger.finish(claim)
    with ledger.begin() as session:
        assert untaught_prompts(session, assistant) == ["prompt 0", "prompt 1"]


def test_taught_prompts_are_those_of_the_lineage(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    route, call = ledger.skill(assistant, "route"), ledger.skill(assistant, "call")
    v1 = ledger.learn(assistant, route, [*lines(0, 2), *lines(1, 2, response="another")])
    v2 = ledger.learn(assistant, call, lines(10, 12))
    with ledger.begin() as session:
        aliases.roll_back(session, assistant, to=None, reason="", actor="user")
    v3 = ledger.learn(assistant, route, lines(5, 6))

    def prompts(version, exclude) -> list[str]:  # type: ignore[no-untyped-def]
        with ledger.begin() as session:
            found = demonstrations.taught_prompts(session, assistant, version, exclude)
            return [messages[-1].content for messages in found]

    assert prompts(ledger.version(assistant, 0), []) == []
    assert prompts(v1, []) == ["prompt 0", "prompt 1"]
    assert prompts(v2, []) == ["prompt 0", "prompt 1", "prompt 10", "prompt 11"]
    assert prompts(v2, ["route"]) == ["prompt 10", "prompt 11"]
    assert prompts(v3, ["call"]) == ["prompt 0", "prompt 1", "prompt 5"]
