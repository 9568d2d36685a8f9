"""Who answers, decided in memory, and what is remembered of it."""

import asyncio
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from api import traffic
from api.metrics import Metrics
from api.traffic import Side, TrafficControl
from api.traffic_keeper import TrafficKeeper
from domain.traffic import Canary, Shadow
from domain.version import ModelName
from registry.traffic import Plan
from registry.traffic_figures import Figures
from serving.routes import Endpoint, Route, Routes, RouteTable

CHAMPION, CANARY = (Route(f"ver_{n}", n, (Endpoint("http://a", f"m{n}"),)) for n in (1, 2))
KEY = ("t", "helper")


def plan(**sides: Any) -> Plan:
    return Plan("asst_1", "helper", "t", 1, sides.get("canary"), sides.get("shadow"), None)


def control(*, canary: Route | None = CANARY) -> TrafficControl:
    routes = RouteTable()
    aliases = {(*KEY, "champion"): CHAMPION} | ({(*KEY, "canary"): canary} if canary else {})
    routes.replace(Routes(aliases, {}))
    return TrafficControl(routes, Metrics())


def roles(made: TrafficControl, times: int = 200) -> set[str | None]:
    sides = [made.choose(*KEY, f"u{n}") for n in range(times)]
    return {None if side is None else side.role for side in sides}


def lease(made: TrafficControl, alias: str) -> Any:
    return made._routes.lease("t", ModelName("helper", alias, None))


def test_without_a_plan_there_is_no_side() -> None:
    assert roles(control()) == {None}


def test_a_canary_gets_its_share_if_it_can_answer() -> None:
    some = control()
    some.plans = {KEY: plan(canary=Canary(percent=50))}
    assert roles(some) == {"champion", "canary"}
    for route in (None, CHAMPION):
        idle = control(canary=route)
        idle.plans = {KEY: plan(canary=Canary(percent=100))}
        assert roles(idle) == {"champion"}, "not loaded, or the champion itself"


def test_a_shadow_follows_the_champions_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "random", random.Random(1))
    made = control()
    made.plans = {KEY: plan(canary=Canary(percent=50), shadow=Shadow(percent=100))}
    sides = [made.choose(*KEY, f"u{n}") for n in range(100)]
    assert {(side.role, side.shadow) for side in sides if side} == {
        ("champion", "candidate"),
        ("canary", None),
    }
    made.plans = {KEY: plan(shadow=Shadow(percent=30))}
    asked = sum(side.shadow is not None for side in (made.choose(*KEY, "u") for _ in range(1000)) if side)
    assert 240 <= asked <= 360, "300 are expected, four standard errors"


def test_a_slow_canary_is_stopped_at_the_next_look_and_stays_so_until_settled() -> None:
    made = control()
    mine = plan(canary=Canary(percent=100, min_requests=40))
    made.plans = {KEY: mine}
    with lease(made, "champion") as champion, lease(made, "canary") as canary:
        for _ in range(50):
            made.record(Side(mine, "champion", "champion"), champion, 0.1)
            made.record(Side(mine, "canary", "canary"), canary, 0.5)
    assert roles(made) == {"canary"}
    made.judge_all()
    assert roles(made) == {"champion"}
    [verdict] = made.unsettled()
    assert (verdict.rollback.rule, verdict.rollback.canary.version) == ("latency_p50", "v2")
    assert (verdict.rollback.canary.latency_p50, verdict.rollback.champion.requests) == (0.5, 50)
    made.judge_all()
    assert made.unsettled() == [verdict], "stopped once"
    made.settled(verdict)
    made.judge_all()
    assert roles(made) == {"champion"}, "still on, still slow: stopped again"


def drive(
    made: TrafficControl,
    mine: Plan,
    monkeypatch: pytest.MonkeyPatch,
    seconds: int,
    champion_fails: Callable[[int], bool],
    canary_fails: Callable[[int], bool],
    canary_every: int,
) -> int | None:
    """The second in which the canary is stopped, if it is: beside a champion of 100 requests a second one of
    the canary's comes after every `canary_every` of those."""
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(traffic, "time", clock)
    made.plans = {KEY: mine}
    with lease(made, "champion") as champion, lease(made, "canary") as canary:
        for tick in range(seconds * 100):
            now = tick / 100
            second = tick // 100
            made.record(Side(mine, "champion", "champion"), champion, None if champion_fails(second) else 0.1)
            if tick % canary_every == 0:
                made.record(Side(mine, "canary", "canary"), canary, None if canary_fails(second) else 0.1)
            if tick % 100 == 0:
                made.judge_all()
            if made.unsettled():
                return second
    return None


def test_an_outage_that_a_busy_champions_window_has_forgotten_is_not_held_against_the_canary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both fail for 30 s. 4096 requests of the champion's are 41 s, and the canary's window is 300 s."""
    made, mine = control(), plan(canary=Canary(percent=5))

    def down(second: int) -> bool:
        return 100 <= second < 130

    assert drive(made, mine, monkeypatch, 300, down, down, canary_every=20) is None


def test_a_rare_canary_beside_a_busy_champion_is_stopped_when_it_fails_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One request a second: 41 of them in the time that the champion's window covers, fewer than the 50 that
    the canary must have in its own."""
    made, mine = control(), plan(canary=Canary(percent=1))

    def never(_: int) -> bool:
        return False

    stopped = drive(made, mine, monkeypatch, 150, never, lambda second: second >= 100, canary_every=100)
    assert stopped == 115, "16 of 116 failed: the lower bound is 5.4%; it is 4.95% for 15 of 115"
    [verdict] = made.unsettled()
    assert (verdict.rollback.champion.requests, verdict.rollback.champion.errors) == (4096, 0)
    assert (verdict.rollback.canary.requests, verdict.rollback.canary.errors) == (41, 16)
    assert verdict.rollback.reason.endswith(
        "it failed 16 of 116 requests, surely more than 5.0%, 16 of the last 41; "
        "the champion 0 of 4096 in that time"
    )


def test_figures_are_taken_once_and_come_back_when_they_could_not_be_written() -> None:
    made = control()
    mine = plan(shadow=Shadow(percent=100))
    with lease(made, "champion") as champion:
        made.record(Side(mine, "champion", "champion"), champion, 0.001)
        made.record(Side(mine, "champion", "champion"), champion, None)
        taken = made.take_figures()
        assert made.take_figures() == []
        made.record(Side(mine, "champion", "champion"), champion, 0.001)
        made.dropped(mine, champion)
    made.give_back(taken)
    expected = Figures("asst_1", "t", "champion", "ver_1", requests=3, errors=1, latency={0: 2})
    dropped = Figures("asst_1", "t", "shadow", "ver_1", dropped=1)
    assert made.take_figures() == [expected, dropped]


class Away:
    """Sessions of a ledger that does not answer."""

    def __call__(self) -> Any:
        raise OperationalError("SELECT", {}, OSError("away"))

    begin = __call__


@pytest.fixture
def keeper() -> tuple[TrafficControl, TrafficKeeper]:
    made = control()
    away: Any = Away()
    return made, TrafficKeeper(made, away, away)


def test_plans_stay_while_the_ledger_is_away(keeper: tuple[TrafficControl, TrafficKeeper]) -> None:
    made, keeping = keeper
    made.plans = {KEY: plan(canary=Canary(percent=100))}

    async def a_while() -> set[str | None]:
        task = asyncio.create_task(keeping.run())
        await asyncio.sleep(0.2)
        seen = roles(made)
        task.cancel()
        await asyncio.wait([task])
        return seen

    assert asyncio.run(a_while()) == {"canary"}


def test_a_canary_that_nobody_judges_gets_nothing(
    keeper: tuple[TrafficControl, TrafficKeeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, keeping = keeper
    made.plans = {KEY: plan(canary=Canary(percent=100))}

    def broken() -> None:
        raise ValueError("a plan that cannot be read")

    monkeypatch.setattr(keeping, "refresh", broken)
    with pytest.raises(ExceptionGroup):
        asyncio.run(keeping.run())
    assert roles(made) == {None}
