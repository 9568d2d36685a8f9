"""Full versions: asked for, probed on an engine of their own, routed to, and let go."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from domain.errors import EngineUnavailable
from domain.version import ModelName
from serving import demands
from serving.demands import Demands
from tests.unit.serving.conftest import PATIENCE, EngineServer
from tests.unit.serving.test_controller import Ledger, Replica, Stand, Version

FULL = Version(2, "f" * 64, "helper-v2-ffffffff", kind="full", checkpoint_id="ver_2")


@pytest.fixture
def pair(tmp_path: Path, adapter: Any, engines: Any, base_config: Any) -> Iterator[Stand]:
    """The base's engine is known; the other runs the checkpoint and is not registered yet."""
    stand = Stand(Ledger(tmp_path, adapter), [engines(), engines()], base_config)
    stand.ledger.replicas.pop()
    stand.engines[1].base = FULL.served_name
    yield stand
    stand.stop()


def second(stand: Stand) -> EngineServer:
    engine: EngineServer = stand.engines[1]
    return engine


def register(stand: Stand) -> None:
    """As the supervisor does once the engine answers."""
    with stand.ledger.changed:
        stand.ledger.replicas.append(Replica(second(stand).url, "ver_2", FULL.served_name))


def wait_demand(stand: Stand, expected: list[str]) -> None:
    with stand.ledger.changed:
        assert stand.ledger.changed.wait_for(lambda: expected in stand.ledger.demanded, PATIENCE)


def test_the_old_version_serves_until_the_checkpoint_s_engine_has_answered_a_probe(pair: Stand) -> None:
    pair.start_on_base()
    assert not pair.serve(FULL, seconds=0.5)
    wait_demand(pair, ["ver_2"])
    assert pair.answer() == (0, "base says hi")
    told = pair.ledger.wait_recorded(lambda _, error: error is not None)
    assert told[0] == "ver_0"
    assert told[1] is not None
    assert "'helper@v2' is starting" in told[1]
    register(pair)
    assert pair.controller.wait_serving("asst_1", "champion", "ver_2", PATIENCE)
    assert pair.answer() == (2, f"{FULL.served_name} says hi")
    assert pair.ledger.wait_recorded(lambda version, _: version == "ver_2") == ("ver_2", None)
    assert second(pair).count("load") == 0
    assert second(pair).count("completions") == 1
    assert "ver_2" not in pair.ledger.verified  # whoever starts its engine verifies it


def test_a_checkpoint_that_cannot_run_leaves_the_old_version_and_is_reported(pair: Stand) -> None:
    pair.ledger.problems["ver_2"] = "4 engines run already"
    pair.start_on_base()
    assert not pair.serve(FULL, seconds=0.3)
    version, error = pair.ledger.wait_recorded(lambda _, error: error is not None and "engines run" in error)
    assert version == "ver_0"
    assert error == "No inference engine runs the checkpoint of 'helper@v2': 4 engines run already"
    assert pair.answer()[0] == 0


def test_rolled_back_it_stays_asked_for_while_somebody_holds_it(
    pair: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demands, "RENEW_SECONDS", 0.05)
    pair.start_on_base()
    register(pair)
    assert pair.serve(FULL)
    held = pair.routes.lease("t", ModelName.parse("helper"))
    assert pair.serve(Version(0, None, "base", kind="base"))
    assert pair.answer()[0] == 0
    before = len(pair.ledger.demanded)
    with pair.ledger.changed:  # still asked for, several rounds later
        assert pair.ledger.changed.wait_for(lambda: len(pair.ledger.demanded) > before + 2, PATIENCE)
        assert pair.ledger.demanded[-1] == ["ver_2"]
    assert pair.answer("helper@v2")[0] == 2
    held.release()
    second(pair).wait_for(lambda: not _routed(pair, 2))
    wait_demand(pair, [])  # taken back, not left to lapse
    for _ in range(2):  # whole rounds: the first lets what was on its way arrive
        with pair.ledger.changed:
            pair.ledger.demanded.clear()
        for engine in pair.engines:
            rounds = engine.lists
            engine.wait_for(lambda engine=engine, rounds=rounds: engine.lists >= rounds + 3)
    assert pair.ledger.demanded == []


def test_back_and_forth_does_not_wait_for_a_start(pair: Stand) -> None:
    pair.start_on_base(idle_seconds=30)
    register(pair)
    for _ in range(3):
        assert pair.serve(FULL)
        assert pair.answer()[0] == 2
        assert pair.serve(Version(0, None, "base", kind="base"))
        assert pair.answer()[0] == 0


def test_an_adapter_on_a_checkpoint_is_loaded_on_the_checkpoint_s_engine(pair: Stand) -> None:
    plain = pair.ledger.version(3)
    v3 = Version(3, plain.manifest_sha256, plain.served_name, checkpoint_id="ver_2")
    pair.start_on_base()
    register(pair)
    assert pair.serve(v3)
    assert pair.answer() == (3, f"{v3.served_name} says hi")
    assert pair.engine.count("load") == 0
    assert list(second(pair).adapters) == [v3.served_name]


def test_a_request_for_a_version_without_an_engine_asks_for_one_and_is_told(pair: Stand) -> None:
    pair.start_on_base(idle_seconds=1)
    with pytest.raises(EngineUnavailable, match=r"'helper@v2' is starting; try again"):
        pair.controller.ensure_loaded(FULL)
    wait_demand(pair, ["ver_2"])
    register(pair)
    with pair.lease_on_demand(FULL):
        assert pair.answer("helper@v2") == (2, f"{FULL.served_name} says hi")
    assert pair.answer()[0] == 0
    wait_demand(pair, [])  # nobody used it for `idle_seconds` since: not kept as long as a start may take


def test_after_a_restart_the_version_before_answers_until_the_engine_has_started(pair: Stand) -> None:
    v1 = pair.ledger.version(1)
    pair.ledger.served_before = [v1]
    pair.ledger.point(FULL)
    pair.start()
    assert pair.controller.wait_serving("asst_1", "champion", "ver_1", PATIENCE)
    assert pair.answer() == (1, f"{v1.served_name} says hi")
    register(pair)
    assert pair.controller.wait_serving("asst_1", "champion", "ver_2", PATIENCE)
    assert pair.answer()[0] == 2


def test_when_its_engine_dies_and_comes_back_elsewhere_the_route_follows(pair: Stand, engines: Any) -> None:
    pair.start_on_base()
    register(pair)
    assert pair.serve(FULL)
    second(pair).stop()
    with pair.ledger.changed:
        pair.ledger.replicas.pop()
    pair.controller.nudge()
    pair.engine.wait_for(lambda: not _routed(pair, 2))
    with pytest.raises(EngineUnavailable):
        pair.answer()
    pair.engines[1] = engines()
    second(pair).base = FULL.served_name
    register(pair)
    assert pair.controller.wait_serving("asst_1", "champion", "ver_2", PATIENCE)
    assert pair.answer()[0] == 2


def test_demands_are_renewed_in_time_and_not_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(demands.time, "monotonic", lambda: now[0])
    asked: list[list[str]] = []
    kept = Demands(lambda ids: asked.append(list(ids)) or {})
    kept.renew(set(), set())
    assert asked == []
    kept.renew({"b", "a"}, {"a", "b"})
    kept.renew({"b", "a"}, {"a", "b"})
    assert asked == [["a", "b"]]
    now[0] += demands.RENEW_SECONDS
    kept.renew({"b", "a"}, {"a", "b"})
    assert len(asked) == 2
    now[0] += demands.LOOK_SECONDS
    kept.renew({"b", "a"}, {"a"})  # one engine is missing: why?
    assert len(asked) == 3
    kept.renew({"a"}, {"a"})
    kept.renew({"a", "b"}, {"a", "b"})
    assert asked[3:] == [["a"], ["a", "b"]]
    kept.renew(set(), {"a"})
    kept.renew(set(), set())
    assert asked[5:] == [[]]


def _routed(stand: Stand, number: int) -> bool:
    return ("t", "helper", number) in stand.routes.routes.versions
