import pytest
from sqlalchemy import text

from domain.errors import AlreadyExists, Conflict, InvalidInput, NotFound
from domain.skill import ContainsGrader, ExactGrader
from domain.version import CHAMPION
from registry import aliases, assistants, audit, updates, versions
from registry.tables import Skill
from tests.unit.registry.steps import TEAM, Ledger, lines, race


def test_a_new_assistant_serves_its_base(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    with ledger.begin() as session:
        found = assistants.get_assistant(session, TEAM, "helper")
        assert found.id == assistants.get_assistant(session, TEAM, assistant.id).id == assistant.id
        base = versions.get_version(session, found, 0)
        assert (base.kind, base.served_name, base.parent_id) == ("base", "tiny", None)
        champion = aliases.get_alias(session, found, CHAMPION)
        assert (champion.version_id, champion.revision) == (base.id, 1)
        moves = aliases.history(session, found, CHAMPION, None, 10).rows
        assert [(move.kind, move.from_version_id, move.to_version_id) for move in moves] == [
            ("create", None, base.id)
        ]
        logged = audit.list_audit(session, TEAM, None, 10).rows
        assert [(row.action, row.actor) for row in logged] == [
            ("assistant.create", "user"),
            ("alias.move", "user"),
        ]


def test_a_name_is_taken_once(ledger: Ledger) -> None:
    ledger.assistant()
    with pytest.raises(AlreadyExists) as caught:
        ledger.assistant()
    assert caught.value.param == "name"
    with ledger.begin() as session:
        assert len(assistants.list_assistants(session, TEAM, None, 10).rows) == 1


def test_many_at_once_take_a_name_once(ledger: Ledger) -> None:
    results = race([ledger.assistant] * 6)
    assert sum(isinstance(result, AlreadyExists) for result in results) == 5
    with ledger.begin() as session:
        assert len(assistants.list_assistants(session, TEAM, None, 10).rows) == 1
        assert session.execute(text("SELECT count(*) FROM versions")).scalar_one() == 1


def test_a_name_that_is_anothers_id_does_not_hide_it(ledger: Ledger) -> None:
    first = ledger.assistant("first")
    ledger.assistant(first.id)
    with ledger.begin() as session:
        assert assistants.get_assistant(session, TEAM, first.id).name == "first"


def test_pages_continue_after_an_id(ledger: Ledger) -> None:
    ids = {ledger.assistant(f"a{n}").id for n in range(5)}
    with ledger.begin() as session:
        made = [row.id for row in assistants.list_assistants(session, TEAM, None, 5).rows]
        assert set(made) == ids
        first = assistants.list_assistants(session, TEAM, None, 2)
        assert ([row.id for row in first.rows], first.has_more) == (made[:2], True)
        second = assistants.list_assistants(session, TEAM, made[1], 3)
        assert ([row.id for row in second.rows], second.has_more) == (made[2:], False)
        assert assistants.list_assistants(session, TEAM, made[4], 3).rows == []
        with pytest.raises(InvalidInput) as caught:
            assistants.list_assistants(session, TEAM, "asst_none", 3)
        assert caught.value.param == "after"


def test_another_teams_objects_do_not_exist(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    ledger.teach(assistant, skill, lines(0, 3))
    update = ledger.queue(assistant)
    with ledger.begin() as session:
        session.execute(text("INSERT INTO teams (id, name, created_at) VALUES ('team_b', 'b', 0)"))
    with ledger.begin() as session:
        for name in ("helper", assistant.id):
            with pytest.raises(NotFound):
                assistants.get_assistant(session, "team_b", name)
        with pytest.raises(NotFound):
            updates.get_update(session, "team_b", update.id)
        with pytest.raises(InvalidInput):
            assistants.list_assistants(session, "team_b", assistant.id, 5)
        assert audit.list_audit(session, "team_b", None, 10).rows == []
        theirs = assistants.create_assistant(
            session,
            team_id="team_b",
            name="helper",
            base_model="tiny",
            parameter_count=1,
            context_window=1,
            actor="user",
        )
        with pytest.raises(NotFound):
            assistants.get_skill(session, theirs, skill.id)


def test_skills_are_found_by_name_and_id_within_their_assistant(ledger: Ledger) -> None:
    one, other = ledger.assistant("one"), ledger.assistant("other")
    skill = ledger.skill(one)
    ledger.skill(other)
    with pytest.raises(AlreadyExists):
        ledger.skill(one)
    with ledger.begin() as session:
        assert assistants.get_skill(session, one, "route").id == skill.id
        assert assistants.get_skill(session, one, skill.id).grader == ExactGrader().model_dump()
        with pytest.raises(NotFound):
            assistants.get_skill(session, other, skill.id)
        assert [row.id for row in assistants.list_skills(session, one, None, 5).rows] == [skill.id]


def test_a_skill_changes_only_what_is_given(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant, holdout_fraction=0.25)
    with ledger.begin() as session:
        assistants.update_skill(session, skill, grader=ContainsGrader(), actor="user")
    with ledger.begin() as session:
        assistants.update_skill(session, skill, description="routes", holdout_fraction=0.5, actor="user")
    with ledger.begin() as session:
        found = assistants.get_skill(session, assistant, "route")
        assert (found.description, found.grader["type"], found.holdout_fraction) == (
            "routes",
            "contains",
            0.5,
        )
        changes = [
            row.data for row in audit.list_audit(session, TEAM, None, 10).rows if row.action == "skill.update"
        ]
        assert changes == [
            {"grader": {"type": "contains", "ignore_case": True}},
            {"description": "routes", "holdout_fraction": 0.5},
        ]


def test_the_holdout_share_is_fixed_by_the_first_demonstration(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant, holdout_fraction=0.25)
    ledger.teach(assistant, skill, lines(0, 4))
    with pytest.raises(Conflict, match="hold-out") as caught, ledger.begin() as session:
        assistants.update_skill(session, skill, holdout_fraction=0.5, description="new", actor="user")
    assert caught.value.param == "holdout_fraction"
    with ledger.begin() as session:
        stored = session.get_one(Skill, skill.id)
        assert (stored.holdout_fraction, stored.description) == (0.25, "")
        assistants.update_skill(session, skill, holdout_fraction=0.25, description="same", actor="user")
