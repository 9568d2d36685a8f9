"""The reads behind pages and lists, on both databases."""

from collections.abc import Iterator

import pytest
from sqlalchemy.orm import Session, sessionmaker

from registry import aliases, assistants, measurements, overview, versions
from registry.session import make_engine, make_sessions
from tests.conftest_databases import NewDatabase
from tests.seeded_story import ASSISTANT, TEAM, Files, tell


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def sessions(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[sessionmaker[Session]]:
    """One assistant with the story (tests.seeded_story) and one that is new."""
    new: NewDatabase = request.getfixturevalue(f"new_{request.param}")
    home = tmp_path_factory.mktemp("home")
    engine = make_engine(new(True))
    made = make_sessions(engine)
    tell(made, Files(home / "artifacts", home / "staging"))
    with made.begin() as session:
        assistants.create_assistant(
            session,
            team_id=TEAM,
            name="fresh",
            base_model="smollm2-135m-instruct",
            parameter_count=1,
            context_window=1,
            actor="user",
        )
    yield made
    engine.dispose()


@pytest.fixture
def told(sessions: sessionmaker[Session]) -> Iterator[Session]:
    """Never committed: every test sees the same story."""
    with sessions() as session:
        yield session


def test_assistants_are_seen_with_what_serves_and_what_happens(told: Session) -> None:
    rows = assistants.list_assistants(told, TEAM, None, 10).rows

    story, fresh = overview.overviews(told, rows)

    assert (story.assistant.name, story.wanted.number, story.skills) == (ASSISTANT, 2, 2)
    assert story.answering is not None
    assert story.answering.number == 2
    assert story.last_update is not None
    assert (story.last_update.status, story.last_update.phase) == ("running", "training")
    assert (fresh.wanted.number, fresh.answering, fresh.skills, fresh.last_update) == (0, None, 0, None)
    assert overview.overviews(told, []) == []


def test_skills_are_counted_by_split_and_by_what_is_still_to_teach(told: Session) -> None:
    """v3 was blocked: its demonstrations count as untaught; those of the running update do not."""
    assistant = assistants.get_assistant(told, TEAM, ASSISTANT)

    banking, tickets = overview.skill_overviews(told, assistant)

    assert (banking.skill.name, banking.train + banking.holdout) == ("banking-intent", 100)
    assert (tickets.skill.name, tickets.train + tickets.holdout) == ("ticket-json", 90)
    blocked = overview.newest_updates(told, assistant, limit=2)[1]
    assert banking.untaught == overview.count_demonstrations(told, blocked) > 0
    assert tickets.untaught == 0


def test_the_newest_come_first_and_no_more_than_asked_for(told: Session) -> None:
    assistant = assistants.get_assistant(told, TEAM, ASSISTANT)
    updates = overview.newest_updates(told, assistant, limit=3)
    running = updates[0]

    assert [update.skills for update in updates] == [["ticket-json"], ["banking-intent"], ["ticket-json"]]
    for champion, newest, numbers in ((2, 2, [0, 2, 3]), (1, 1, [0, 1, 3]), (2, None, [0, 1, 2, 3])):
        serving = versions.get_version(told, assistant, champion)
        shown = overview.shown_versions(told, assistant, serving, newest=newest)
        assert [row.number for row in shown] == numbers
    assert [move.revision for move in overview.newest_moves(told, assistant, limit=2)] == [3, 2]
    assert [event.data["step"] for event in overview.newest_steps(told, running, limit=3)] == [32, 33, 34]
    messages = overview.newest_messages(told, running, limit=2)
    assert ([event.message for event in messages.rows], messages.has_more) == (
        ["training", "preflight"],
        True,
    )


def test_a_lineage_names_what_each_update_taught(told: Session) -> None:
    assistant = assistants.get_assistant(told, TEAM, ASSISTANT)
    blocked = versions.get_version(told, assistant, 3)

    by_number = overview.taught_skills(told, assistant, None)
    assert by_number == {1: ["banking-intent"], 2: ["ticket-json"], 3: ["banking-intent"]}
    assert overview.taught_skills(told, assistant, [blocked]) == {3: ["banking-intent"]}
    taught = versions.taught_along(told, blocked)

    assert taught == [(0, []), (1, ["banking-intent"]), (2, ["ticket-json"]), (3, ["banking-intent"])]
    scores = sorted(measurements.scores_along(told, versions.get_version(told, assistant, 1)))
    assert [one for one in scores if one[2] == "banking-intent"] == [
        (0, "skill", "banking-intent", 0.0),
        (1, "skill", "banking-intent", 51 / 60),
    ]
    assert {number for number, *_ in scores} == {0, 1}


def test_the_champions_line_is_where_rollbacks_lead(told: Session) -> None:
    assistant = assistants.get_assistant(told, TEAM, ASSISTANT)

    assert [row.number for row in aliases.champion_line(told, assistant, newest=9)] == [0, 1, 2]
    move = aliases.roll_back(told, assistant, to=None, reason="", actor="user")
    line = aliases.champion_line(told, assistant, newest=9)
    assert [row.number for row in line] == [0, 1]
    assert move.to_version_id == line[-1].id
