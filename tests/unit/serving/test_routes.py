"""Leases are counted, turns are taken, and nothing is retired while it is in use."""

import threading

import pytest

from domain.errors import EngineUnavailable
from domain.version import ModelName
from serving.routes import NOT_ROUTED, Endpoint, Lease, Route, Routes, RouteTable

ONE, TWO = Endpoint("http://a", "helper-v1-00000000"), Endpoint("http://b", "helper-v1-00000000")
NEXT = Endpoint("http://a", "helper-v2-00000000")
CHAMPION, V1 = ModelName.parse("helper"), ModelName.parse("helper@v1")


def table(alias: Endpoint | None = ONE, *others: Endpoint) -> RouteTable:
    routes = RouteTable()
    first = Route("ver_1", 1, (ONE, *others))
    routes.replace(
        Routes(
            {} if alias is None else {("t", "helper", "champion"): Route("ver_x", 9, (alias, *others))},
            {("t", "helper", 1): first},
        )
    )
    return routes


def test_a_lease_names_the_endpoint_and_the_version() -> None:
    with table().lease("t", V1) as lease:
        assert (lease.url, lease.engine_model, lease.version_id, lease.version_number) == (
            "http://a",
            "helper-v1-00000000",
            "ver_1",
            1,
        )


@pytest.mark.parametrize(
    ("team", "model"), [("t", "other"), ("t", "helper@canary"), ("t", "helper@v2"), ("u", "helper")]
)
def test_what_is_not_routed_is_refused(team: str, model: str) -> None:
    with pytest.raises(EngineUnavailable) as caught:
        table().lease(team, ModelName.parse(model))
    assert caught.value.code == NOT_ROUTED


def test_leases_are_counted_and_released_once() -> None:
    routes = table()
    first, second = routes.lease("t", V1), routes.lease("t", CHAMPION)
    assert routes.leases(ONE) == 2
    first.release()
    first.release()
    assert routes.leases(ONE) == 1
    second.release()
    assert routes.leases(ONE) == 0


def test_replicas_take_turns() -> None:
    routes = table(ONE, TWO)
    urls = [routes.lease("t", V1).url for _ in range(6)]
    assert urls.count("http://a") == urls.count("http://b") == 3


def test_the_engine_with_the_fewest_leases_is_chosen() -> None:
    """All of an engine's models count: the other one of the busy engine's is not free."""
    routes = RouteTable()
    other = Endpoint("http://a", "other-v1-00000000")
    routes.replace(
        Routes(
            {}, {("t", "helper", 1): Route("ver_1", 1, (ONE, TWO)), ("t", "o", 1): Route("o", 1, (other,))}
        )
    )
    held = [routes.lease("t", ModelName.parse("o@v1")) for _ in range(3)]
    assert [routes.lease("t", V1).url for _ in range(3)] == ["http://b"] * 3
    assert (routes.busy("http://a"), routes.busy("http://b")) == (3, 3)
    held[0].release()
    assert routes.lease("t", V1).url == "http://a"


def test_an_engine_that_failed_is_the_last_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.routes.SUSPECT_SECONDS", 60.0)
    routes = table(ONE, TWO)
    assert {routes.lease("t", V1, avoid={"http://a"}).url for _ in range(4)} == {"http://b"}
    routes.suspect("http://b")
    assert {routes.lease("t", V1).url for _ in range(9)} == {"http://a"}
    routes.trust("http://b")
    assert routes.lease("t", V1).url == "http://b", "it has five leases fewer"
    only = table()
    only.suspect("http://a")
    assert only.lease("t", V1, avoid={"http://a"}).url == "http://a", "there is no other"


def test_retiring_needs_no_alias_no_lease_and_no_recent_use() -> None:
    assert not table().retire(ONE, 0.0), "an alias leads to it"
    routes = table(NEXT)
    lease = routes.lease("t", V1)
    assert not routes.retire(ONE, 0.0), "somebody holds it"
    lease.release()
    assert not routes.retire(ONE, 60.0), "somebody just used it"
    assert routes.retire(ONE, 0.0)
    with pytest.raises(EngineUnavailable):
        routes.lease("t", V1)


def test_an_endpoint_never_seen_before_is_idle_from_now_on() -> None:
    assert not table(None).retire(TWO, 60.0)


def test_retiring_one_replica_leaves_the_other() -> None:
    routes = table(None, TWO)
    assert routes.retire(ONE, 0.0)
    assert {routes.lease("t", V1).url for _ in range(4)} == {"http://b"}


def test_no_lease_is_granted_on_a_retired_endpoint() -> None:
    """Leasers and a retirer race; whoever got a lease got it before, and the retirer saw it."""
    for _ in range(50):
        routes = table(NEXT)
        barrier = threading.Barrier(5)
        held: list[Lease] = []
        refused: list[str] = []

        def take(
            routes: RouteTable = routes,
            barrier: threading.Barrier = barrier,
            held: list[Lease] = held,
            refused: list[str] = refused,
        ) -> None:
            barrier.wait()
            try:
                held.append(routes.lease("t", V1))
            except EngineUnavailable as error:
                refused.append(error.code)

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        barrier.wait()
        retired = routes.retire(ONE, 0.0)
        for thread in threads:
            thread.join()
        assert not (retired and held)
        assert refused == ([NOT_ROUTED] * 4 if retired else [])
