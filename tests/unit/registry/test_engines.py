"""Who needs an engine for a whole model, on both databases."""

import pytest

from domain.errors import CorruptArtifact, StaleFence
from domain.version import Checkpoint, WholeModel
from registry import aliases, engines, serving
from registry.tables import Assistant, Version
from tests.unit.registry.steps import TEAM, Ledger, lines


def with_a_full_version(ledger: Ledger) -> tuple[Assistant, Version]:
    """v1 is full and champion."""
    assistant = ledger.assistant()
    return assistant, ledger.learn(assistant, ledger.skill(assistant), lines(0, 2), kind="full")


def wanted(ledger: Ledger) -> list[str]:
    with ledger.begin() as session:
        return [model.id for model in engines.wanted_models(session)]


def point(ledger: Ledger, assistant: Assistant, number: int, alias: str = "champion") -> None:
    version = ledger.version(assistant, number)
    with ledger.begin() as session:
        aliases.move_alias(
            session, assistant, alias, version, kind="promote", reason="", actor="u", expected_revision=None
        )


def test_an_aliased_full_version_is_wanted_without_a_demand(ledger: Ledger) -> None:
    assistant, full = with_a_full_version(ledger)
    with ledger.begin() as session:
        assert engines.wanted_models(session) == [
            WholeModel(
                id=full.id,
                served_name="served-v1",
                base_model="tiny",
                manifest_sha256="0" * 64,
                folder=None,
            )
        ]
    point(ledger, assistant, 0)
    assert wanted(ledger) == []


def test_an_adapter_on_a_checkpoint_wants_the_checkpoint(ledger: Ledger) -> None:
    assistant, full = with_a_full_version(ledger)
    below = Checkpoint(version_id=full.id, manifest_sha256="0" * 64)
    ledger.learn(assistant, ledger.skill(assistant, "other"), lines(5, 7), checkpoint=below)
    with ledger.begin() as session:
        [one] = serving.wanted(session)
        assert (one.number, one.kind, one.base_model, one.engine_base) == (2, "adapter", "tiny", full.id)
        by_number = serving.wanted_version(session, TEAM, "helper", 1)
        assert (by_number.kind, by_number.engine_base) == ("full", full.id)
        assert serving.wanted_version(session, TEAM, "helper", 0).engine_base == "tiny"
    assert wanted(ledger) == [full.id]


def test_an_adapter_must_name_what_its_parent_lies_on(ledger: Ledger) -> None:
    assistant, full = with_a_full_version(ledger)
    skill = ledger.skill(assistant, "other")
    ledger.teach(assistant, skill, lines(5, 7))
    claim = ledger.must_claim(ledger.queue(assistant, ["other"]))
    for wrong in (None, Checkpoint(version_id=full.id, manifest_sha256="1" * 64)):
        with pytest.raises(CorruptArtifact, match="another checkpoint"):
            ledger.publish(claim, checkpoint=wrong)
    assert ledger.publish(claim, kind="full").number == 2


def test_a_demand_of_serving_runs_out(ledger: Ledger) -> None:
    assistant, full = with_a_full_version(ledger)
    point(ledger, assistant, 0)
    with ledger.begin() as session:
        assert engines.demand_serving(session, "gw_1", [full.id], 60) == {}
    assert wanted(ledger) == [full.id]
    with ledger.begin() as session:
        engines.demand_serving(session, "gw_1", [full.id], -1)
    assert wanted(ledger) == []


def test_a_gateway_takes_back_its_own_demands_and_nobody_else_s(ledger: Ledger) -> None:
    assistant, full = with_a_full_version(ledger)
    point(ledger, assistant, 0)
    with ledger.begin() as session:
        for gateway in ("gw_1", "gw_2"):
            engines.demand_serving(session, gateway, [full.id], 60)
    with ledger.begin() as session:
        assert engines.demand_serving(session, "gw_1", [], 60) == {}
    assert wanted(ledger) == [full.id]
    with ledger.begin() as session:
        engines.demand_serving(session, "gw_2", ["ver_other"], 60)
    assert wanted(ledger) == []


def test_whoever_asked_is_told_why_it_does_not_run(ledger: Ledger) -> None:
    _, full = with_a_full_version(ledger)
    with ledger.begin() as session:
        engines.demand_serving(session, "gw_1", [full.id], 60)
        engines.report(session, full.id, "no room")
    with ledger.begin() as session:
        assert engines.demand_serving(session, "gw_1", [full.id], 60) == {full.id: "no room"}
        assert engines.problem(session, full.id) == "no room"
        engines.report(session, full.id, None)
        assert engines.demand_serving(session, "gw_1", [full.id], 60) == {}


def test_an_evaluation_s_demand_holds_as_long_as_its_lease(ledger: Ledger) -> None:
    assistant, full = with_a_full_version(ledger)
    ledger.teach(assistant, ledger.skill(assistant, "other"), lines(5, 7))
    point(ledger, assistant, 0)
    update = ledger.queue(assistant, ["other"])
    claim = ledger.must_claim(update, lease_seconds=-1)
    with ledger.begin() as session:
        engines.demand_for_update(session, claim, update.id, "/work/candidate")
        engines.demand_for_update(session, claim, full.id, None)
    assert wanted(ledger) == []  # its lease has run out already
    successor = ledger.must_claim(update)
    with ledger.begin() as session:
        candidate, parent = engines.wanted_models(session)
    assert candidate == WholeModel(
        id=update.id,
        served_name=f"cand-{update.id}",
        base_model="tiny",
        manifest_sha256=None,
        folder="/work/candidate",
    )
    assert parent.id == full.id
    with pytest.raises(StaleFence), ledger.begin() as session:
        engines.withdraw(session, claim, update.id)
    with ledger.begin() as session:
        engines.withdraw(session, successor, update.id)
    assert wanted(ledger) == [full.id]


def test_an_engine_is_let_go_only_when_nobody_wants_its_model(ledger: Ledger) -> None:
    assistant, full = with_a_full_version(ledger)
    url = "http://127.0.0.1:1"
    with ledger.begin() as session:
        serving.register_replica(session, url, full.id, "served-v1")
        assert not engines.let_go(session, full.id, url)
        assert [replica.base_model for replica in serving.replicas(session)] == [full.id]
    point(ledger, assistant, 0)
    with ledger.begin() as session:
        assert engines.let_go(session, full.id, url)
        assert serving.replicas(session) == []
