"""Champion, canary or shadow: who answers a request, and what is remembered about it. All in memory.

The event loop alone calls what changes state here; `plans` is replaced as a whole by whoever read the ledger.
"""

import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from api.metrics import Metrics
from domain.traffic import Canary, CanaryRollback, Role, WindowFigures
from domain.version import CHAMPION
from registry.traffic import Plan
from registry.traffic_figures import Figures
from serving.canary import Breach, Seen, Window, judge, share_of
from serving.latency import bucket
from serving.routes import Lease, Route, RouteTable


@dataclass(frozen=True)
class Side:
    """The part of a request in its assistant's plan."""

    plan: Plan
    role: Role
    alias: str
    shadow: str | None = None
    """Alias whose version is to be asked as well."""


@dataclass(frozen=True)
class Verdict:
    """A canary that must go."""

    plan: Plan
    rollback: CanaryRollback


class TrafficControl:
    def __init__(self, routes: RouteTable, metrics: Metrics) -> None:
        self._routes = routes
        self._metrics = metrics
        self.plans: Mapping[tuple[str, str], Plan] = {}
        """By team id and assistant's name."""
        self._windows: dict[tuple[str, str], Window] = {}
        """By assistant's and version's id."""
        self._stopped: dict[str, Verdict] = {}
        """By assistant id: canaries that get no more traffic here, until the ledger knows it as well."""
        self._figures: dict[tuple[str, Role, str], Figures] = {}

    def choose(self, team_id: str, assistant: str, user: str | None) -> Side | None:
        """Who answers `user` (None: nobody known, a dice decides) for a bare assistant's name; None without
        a plan. A canary that is not loaded, or is the champion, gets nothing."""
        plan = self.plans.get((team_id, assistant))
        if plan is None:
            return None
        route = self._canary_route(plan)
        if plan.canary is not None and route is not None:
            place = share_of(plan.assistant_id, route.version_id, user) if user else random.random()
            if place < plan.canary.percent / 100:
                return Side(plan, "canary", plan.canary.alias)
        return Side(plan, "champion", CHAMPION, self._shadow(plan))

    def record(self, side: Side, lease: Lease, latency: float | None) -> None:
        """One request is over: its seconds to the first byte, or None when it failed."""
        self.count(side.plan, side.role, lease, latency)
        if side.plan.canary is None:
            return
        key = (side.plan.assistant_id, lease.version_id)
        self._windows.setdefault(key, Window()).add(time.monotonic(), latency)
        if latency is None and side.role == "canary":
            self._judge(side.plan)

    def count(self, plan: Plan, role: Role, lease: Lease, latency: float | None) -> Figures:
        """Add to the durable figures, which are returned for what else is to be added."""
        figures = self._figures_of(plan, role, lease.version_id)
        figures.requests += 1
        labels = (plan.assistant_name, role, f"v{lease.version_number}")
        self._metrics.traffic_requests.labels(*labels, "ok" if latency is not None else "error").inc()
        if latency is None:
            figures.errors += 1
        else:
            figures.latency[bucket(latency)] = figures.latency.get(bucket(latency), 0) + 1
            self._metrics.traffic_first_byte_seconds.labels(*labels).observe(latency)
        return figures

    def dropped(self, plan: Plan, lease: Lease) -> None:
        """A shadow request that was not sent, or broken off, for want of room."""
        self._figures_of(plan, "shadow", lease.version_id).dropped += 1
        labels = (plan.assistant_name, "shadow", f"v{lease.version_number}", "dropped")
        self._metrics.traffic_requests.labels(*labels).inc()

    def judge_all(self) -> None:
        """Look at every canary; what was seen of versions that no plan needs is forgotten."""
        needed = set()
        for plan in self.plans.values():
            if plan.canary is not None:
                for route in (self._route(plan, plan.canary.alias), self._route(plan, CHAMPION)):
                    if route is not None:
                        needed.add((plan.assistant_id, route.version_id))
            self._judge(plan)
        for key in self._windows.keys() - needed:
            del self._windows[key]

    def unsettled(self) -> list[Verdict]:
        """Rollbacks that the ledger has not heard of."""
        return list(self._stopped.values())

    def settled(self, verdict: Verdict) -> None:
        """The ledger knows it, or has another plan by now: `plans` has been read since."""
        self._stopped.pop(verdict.plan.assistant_id, None)

    def take_figures(self) -> list[Figures]:
        taken, self._figures = self._figures, {}
        return list(taken.values())

    def give_back(self, figures: Iterable[Figures]) -> None:
        """Figures that could not be written: they wait for the next time."""
        for one in figures:
            known = self._figures.setdefault((one.assistant_id, one.role, one.version_id), one)
            if known is not one:
                known.add(one)

    def _judge(self, plan: Plan) -> None:
        limits, canary = plan.canary, self._canary_route(plan)
        champion = self._route(plan, CHAMPION)
        if limits is None or canary is None or champion is None:
            return
        now, seconds = time.monotonic(), limits.window_seconds
        windows = [
            self._windows.get((plan.assistant_id, one.version_id), Window()) for one in (canary, champion)
        ]
        mine, others = (window.seen(now, seconds) for window in windows)
        common = max(window.reaches_back_to(now, seconds) for window in windows)
        together = mine, others
        if common > now - seconds:
            together = windows[0].seen_since(common), windows[1].seen_since(common)
        breach = judge(limits, mine, others, together)
        if breach is None:
            return
        rollback = _rollback(breach, limits, (canary, together[0]), (champion, together[1]))
        self._stopped[plan.assistant_id] = Verdict(plan, rollback)
        self._metrics.canary_rollbacks.labels(plan.assistant_name, breach.rule).inc()

    def _canary_route(self, plan: Plan) -> Route | None:
        """None as well when the canary was stopped, or is what the champion is."""
        if plan.canary is None or plan.assistant_id in self._stopped:
            return None
        route, champion = self._route(plan, plan.canary.alias), self._route(plan, CHAMPION)
        same = route is not None and champion is not None and route.version_id == champion.version_id
        return None if same else route

    def _shadow(self, plan: Plan) -> str | None:
        """By a dice of its own for each request: a shadow's users need not stay."""
        if plan.shadow is None or random.random() * 100 >= plan.shadow.percent:
            return None
        return plan.shadow.alias

    def _route(self, plan: Plan, alias: str) -> Route | None:
        return self._routes.routes.aliases.get((plan.team_id, plan.assistant_name, alias))

    def _figures_of(self, plan: Plan, role: Role, version_id: str) -> Figures:
        key = (plan.assistant_id, role, version_id)
        found = self._figures.get(key)
        if found is None:
            found = self._figures[key] = Figures(plan.assistant_id, plan.team_id, role, version_id)
        return found


def _rollback(
    breach: Breach, limits: Canary, canary: tuple[Route, Seen], champion: tuple[Route, Seen]
) -> CanaryRollback:
    return CanaryRollback(
        rule=breach.rule,
        reason=f"v{canary[0].version_number} was a worse canary: {breach.reason}",
        alias=limits.alias,
        percent=limits.percent,
        canary=_window_figures(*canary),
        champion=_window_figures(*champion),
    )


def _window_figures(route: Route, seen: Seen) -> WindowFigures:
    return WindowFigures(
        version=f"v{route.version_number}",
        requests=seen.requests,
        errors=seen.errors,
        latency_p50=seen.latency(0.5),
        latency_p95=seen.latency(0.95),
    )
