"""Traffic plans: compare-and-set, audited with the change, rolled back once, figures added up."""

from collections.abc import Sequence
from typing import Any

import pytest

from domain.errors import CanaryCoolingDown, InvalidInput, RevisionMismatch
from domain.skill import ExactGrader
from domain.traffic import Canary, CanaryRollback, Shadow, Traffic, WindowFigures
from registry import aliases, audit, traffic, traffic_figures, versions, webhooks
from registry.tables import Assistant, TrafficRow
from registry.traffic import Plan
from registry.traffic_figures import Figures
from tests.unit.registry.steps import TEAM, Ledger, lines, race

FIVE = Traffic(canary=Canary(percent=5))
SEEN = WindowFigures(version="v1", requests=60, errors=30, latency_p50=0.1, latency_p95=None)
ROLLBACK = CanaryRollback(
    rule="error_rate", reason="v1 failed", alias="canary", percent=5, canary=SEEN, champion=SEEN
)


@pytest.fixture
def assistant(ledger: Ledger) -> Assistant:
    """v1 is the champion, v0 answers for `canary` and `candidate`."""
    made = ledger.assistant()
    ledger.learn(made, ledger.skill(made), lines(0, 1))
    with ledger.begin() as session:
        for alias in ("canary", "candidate"):
            aliases.move_alias(
                session,
                made,
                alias,
                versions.get_version(session, made, 0),
                kind="promote",
                reason="",
                actor="user",
                expected_revision=None,
            )
    return made


def put(ledger: Ledger, assistant: Assistant, wanted: Traffic, expected: int | None = None) -> TrafficRow:
    with ledger.begin() as session:
        return traffic.set_traffic(session, assistant, wanted, actor="user", expected_revision=expected)


def plans(ledger: Ledger) -> list[Plan]:
    with ledger.begin() as session:
        return traffic.plans(session)


def entries(ledger: Ledger) -> list[tuple[str, str, Any]]:
    with ledger.begin() as session:
        rows = audit.list_audit(session, TEAM, None, 100).rows
        return [
            (row.actor, row.action, row.data)
            for row in rows
            if row.action.partition(".")[0] in ("traffic", "canary")
        ]


def test_a_change_is_compared_counted_and_audited(ledger: Ledger, assistant: Assistant) -> None:
    assert plans(ledger) == []
    with pytest.raises(RevisionMismatch, match="revision 0, not 1"):
        put(ledger, assistant, FIVE, expected=1)
    assert entries(ledger) == []
    assert put(ledger, assistant, FIVE, expected=0).revision == 1
    assert put(ledger, assistant, FIVE, expected=1).revision == 1, "nothing changed"
    with pytest.raises(RevisionMismatch, match="revision 1, not 0"):
        put(ledger, assistant, Traffic(), expected=0)
    assert put(ledger, assistant, Traffic(), expected=1).revision == 2
    found = entries(ledger)
    assert [(actor, action, data["revision"]) for actor, action, data in found] == [
        ("user", "traffic.set", 1),
        ("user", "traffic.clear", 2),
    ]
    assert found[0][2]["canary"] == FIVE.canary.model_dump(mode="json")  # type: ignore[union-attr]
    assert plans(ledger) == []


def test_a_plan_holds_what_the_gateway_needs(ledger: Ledger, assistant: Assistant) -> None:
    shadow = Shadow(percent=50, skill="route")
    put(ledger, assistant, Traffic(canary=Canary(percent=20), shadow=shadow))
    ledger.assistant("without")
    [plan] = plans(ledger)
    assert (plan.assistant_id, plan.assistant_name, plan.team_id) == (assistant.id, "helper", TEAM)
    assert (plan.revision, plan.canary, plan.shadow) == (1, Canary(percent=20), shadow)
    assert plan.grader == ExactGrader()
    put(ledger, assistant, Traffic(shadow=Shadow(percent=1)))
    [plan] = plans(ledger)
    assert (plan.revision, plan.canary, plan.grader) == (2, None, None)


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        (Traffic(canary=Canary(alias="nobody", percent=1)), "canary.alias"),
        (Traffic(shadow=Shadow(alias="nobody", percent=1)), "shadow.alias"),
        (Traffic(shadow=Shadow(percent=1, skill="nothing")), "shadow.skill"),
    ],
)
def test_what_is_named_must_exist(ledger: Ledger, assistant: Assistant, wanted: Traffic, param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        put(ledger, assistant, wanted)
    assert caught.value.param == param
    assert plans(ledger) == []


def test_of_many_first_changes_one_wins(ledger: Ledger, assistant: Assistant) -> None:
    def change() -> str:
        try:
            return f"revision {put(ledger, assistant, FIVE, expected=0).revision}"
        except RevisionMismatch:
            return "late"

    assert sorted(race([change] * 4)) == ["late", "late", "late", "revision 1"]
    assert len(entries(ledger)) == 1


def test_a_rollback_happens_once_and_is_told(ledger: Ledger, assistant: Assistant) -> None:
    with ledger.begin() as session:
        hook = webhooks.create_webhook(
            session,
            team_id=TEAM,
            url="https://8.8.8.8",
            description="",
            event_types=["canary.rolled_back"],
            actor="user",
        )
    shadow = Shadow(percent=9)
    put(ledger, assistant, Traffic(canary=Canary(percent=5, cooldown_seconds=300), shadow=shadow))
    [plan] = plans(ledger)

    def roll_back() -> bool:
        with ledger.begin() as session:
            return traffic.roll_back_canary(session, plan, ROLLBACK)

    assert sorted(race([roll_back] * 4)) == [False, False, False, True]
    [left] = plans(ledger)
    assert (left.canary, left.shadow, left.revision) == (None, shadow, 2)
    actor, action, data = entries(ledger)[-1]
    assert (actor, action, data["revision"]) == ("gateway", "canary.rollback", 2)
    assert data["canary"] == {
        "version": "v1",
        "requests": 60,
        "errors": 30,
        "latency_p50": 0.1,
        "latency_p95": None,
    }
    assert [action for _, action, _ in entries(ledger)] == ["traffic.set", "canary.rollback"]
    with ledger.begin() as session:
        told = webhooks.list_deliveries(session, hook, None, 10).rows
        assert [one.type for one in told] == ["canary.rolled_back"]


def test_a_rollback_of_what_was_changed_meanwhile_does_nothing(ledger: Ledger, assistant: Assistant) -> None:
    put(ledger, assistant, FIVE)
    [plan] = plans(ledger)
    put(ledger, assistant, Traffic(canary=Canary(percent=6)))
    with ledger.begin() as session:
        assert not traffic.roll_back_canary(session, plan, ROLLBACK)
    [left] = plans(ledger)
    assert left.canary == Canary(percent=6)


def test_no_canary_until_it_has_cooled_down(ledger: Ledger, assistant: Assistant) -> None:
    put(ledger, assistant, Traffic(canary=Canary(percent=5, cooldown_seconds=300)))
    [plan] = plans(ledger)
    with ledger.begin() as session:
        assert traffic.roll_back_canary(session, plan, ROLLBACK)
    with pytest.raises(CanaryCoolingDown, match="v1 failed") as caught:
        put(ledger, assistant, FIVE)
    assert caught.value.retry_after_seconds == pytest.approx(300, abs=20)
    put(ledger, assistant, Traffic(shadow=Shadow(percent=1)))
    with ledger.begin() as session:
        session.get_one(TrafficRow, assistant.id).cooldown_until = 1.0
    assert put(ledger, assistant, FIVE).canary is not None


def test_figures_add_up_and_begin_anew_with_another_alias(ledger: Ledger, assistant: Assistant) -> None:
    put(ledger, assistant, FIVE)
    with ledger.begin() as session:
        version = versions.get_version(session, assistant, 1).id

    def one(role: Any = "canary", **sums: Any) -> Figures:
        return Figures(assistant.id, TEAM, role, version, **sums)

    def add(found: Sequence[Figures]) -> None:
        with ledger.begin() as session:
            traffic_figures.add_figures(session, found)

    race([lambda: add([one(requests=2, errors=1, latency={3: 1})])] * 4)
    add([one("champion", requests=7, latency={0: 7}), one(requests=1, latency={3: 1, 9: 1}, rouge_l=0.5)])
    with ledger.begin() as session:
        champion, canary = traffic_figures.list_figures(session, assistant)
    assert (champion.role, champion.requests, champion.latency) == ("champion", 7, {"0": 7})
    assert (canary.role, canary.requests, canary.errors, canary.rouge_l) == ("canary", 9, 4, 0.5)
    assert canary.latency == {"3": 5, "9": 1}

    def known(wanted: Traffic) -> int:
        put(ledger, assistant, wanted)
        with ledger.begin() as session:
            return len(traffic_figures.list_figures(session, assistant))

    assert known(Traffic(canary=Canary(percent=20))) == 2, "the same canary"
    assert known(Traffic()) == 2, "off, and still to be looked at"
    assert known(Traffic(canary=Canary(percent=20, alias="candidate"))) == 0
