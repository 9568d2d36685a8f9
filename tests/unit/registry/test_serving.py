import pytest
from sqlalchemy import event

from domain.errors import NotFound
from registry import aliases, serving, versions
from registry.serving import Wanted
from tests.unit.registry.steps import TEAM, Ledger, lines


def test_wanted_is_every_alias_in_one_query(ledger: Ledger) -> None:
    one, other = ledger.assistant("one"), ledger.assistant("other")
    v1 = ledger.learn(one, ledger.skill(one), lines(0, 1))
    base = ledger.version(one, 0)
    with ledger.begin() as session:
        aliases.move_alias(
            session, one, "canary", base, kind="promote", reason="", actor="user", expected_revision=None
        )
    statements: list[str] = []
    event.listen(ledger.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    with ledger.begin() as session:
        statements.clear()
        found = sorted(serving.wanted(session), key=lambda one: one.assistant_name != "one")
        assert len([statement for statement in statements if statement.startswith("SELECT")]) == 1
    assert [(w.assistant_name, w.alias, w.number, w.served_name, w.kind) for w in found] == [
        ("one", "champion", 1, "served-v1", "adapter"),
        ("one", "canary", 0, "tiny", "base"),
        ("other", "champion", 0, "tiny", "base"),
    ]
    assert found[0] == Wanted(
        assistant_id=one.id,
        assistant_name="one",
        team_id=TEAM,
        alias="champion",
        version_id=v1.id,
        number=1,
        served_name="served-v1",
        kind="adapter",
        manifest_sha256="0" * 64,
        base_model="tiny",
        checkpoint_id=None,
        update_id=v1.update_id,
    )
    assert found[0].engine_base == "tiny"
    assert found[2].assistant_id == other.id


def test_what_served_last_is_remembered(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    ledger.learn(assistant, ledger.skill(assistant), lines(0, 1))
    with ledger.begin() as session:
        assert serving.served(session) == []
        base = versions.get_version(session, assistant, 0)
        serving.record_serving(session, assistant.id, "champion", base.id, "still loading v1")
        serving.record_serving(session, assistant.id, "canary", None, "nothing serves")
    with ledger.begin() as session:
        [before] = serving.served(session)
        [now] = serving.wanted(session)
    assert (before.alias, before.number, now.alias, now.number) == ("champion", 0, "champion", 1)


def test_a_version_is_wanted_by_its_number(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    ledger.learn(assistant, ledger.skill(assistant), lines(0, 1))
    with ledger.begin() as session:
        found = serving.wanted_version(session, TEAM, "helper", 0)
        assert (found.number, found.alias, found.served_name) == (0, "v0", "tiny")
        for team, name, number in ((TEAM, "helper", 2), (TEAM, "nobody", 0), ("team_b", "helper", 0)):
            with pytest.raises(NotFound):
                serving.wanted_version(session, team, name, number)


def test_replicas_come_and_go(ledger: Ledger) -> None:
    ledger.assistant()
    with ledger.begin() as session:
        assert serving.base_models_in_use(session) == ["tiny"]
        serving.register_replica(session, "http://127.0.0.1:1", "tiny", "tiny")
        serving.register_replica(session, "http://127.0.0.1:2", "tiny", "tiny")
        serving.register_replica(session, "http://127.0.0.1:1", "tiny", "renamed")
        assert {r.url: r.model_name for r in serving.replicas(session)} == {
            "http://127.0.0.1:1": "renamed",
            "http://127.0.0.1:2": "tiny",
        }
        serving.remove_replica(session, "http://127.0.0.1:1")
        serving.remove_replica(session, "http://127.0.0.1:9")
        assert [r.url for r in serving.replicas(session)] == ["http://127.0.0.1:2"]


def test_the_newest_serving_state_counts(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    with ledger.begin() as session:
        base = versions.get_version(session, assistant, 0).id
        assert serving.serving_state(session, assistant.id, "champion") is None
        serving.record_serving(session, assistant.id, "champion", base, "cannot load v1")
    with ledger.begin() as session:
        state = serving.serving_state(session, assistant.id, "champion")
        assert state is not None
        assert (state.version_id, state.error) == (base, "cannot load v1")
        serving.record_serving(session, assistant.id, "champion", base, None)
        state = serving.serving_state(session, assistant.id, "champion")
        assert state is not None
        assert state.error is None
