"""Adapters beyond what an engine may hold: the least recently used goes, what aliases name stays."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from domain.errors import EngineUnavailable
from domain.version import ModelName
from serving.client import EngineClient
from tests.unit.serving.conftest import PATIENCE
from tests.unit.serving.test_controller import Ledger, Stand, Version


@pytest.fixture
def stand(tmp_path: Path, adapter: Any, engine: Any, base_config: Any) -> Iterator[Stand]:
    """Five slots, two of them kept for evaluations; champion is v1, and nothing leaves for being idle."""
    stand = Stand(Ledger(tmp_path, adapter), [engine], base_config)
    stand.slots = 5
    stand.ledger.point(stand.ledger.version(1))
    stand.start(idle_seconds=3600)
    assert stand.controller.wait_serving("asst_1", "champion", "ver_1", PATIENCE)
    yield stand
    stand.stop()


def asked(stand: Stand, number: int) -> Version:
    """A version by its number, loaded on demand and used once."""
    version = replace(stand.ledger.version(number), alias=f"v{number}")
    stand.controller.ensure_loaded(version)
    assert stand.answer(f"helper@v{number}")[0] == number
    return version


def held(stand: Stand) -> set[str]:
    return {name.split("-")[1] for name in stand.engine.adapters}


def test_the_least_recently_used_goes_first_and_the_champion_stays(stand: Stand) -> None:
    asked(stand, 2)
    asked(stand, 3)
    assert held(stand) == {"v1", "v2", "v3"}
    assert stand.answer("helper@v2")[0] == 2
    asked(stand, 4)
    assert held(stand) == {"v1", "v2", "v4"}
    asked(stand, 5)
    assert held(stand) == {"v1", "v4", "v5"}
    assert stand.answer()[0] == 1
    with pytest.raises(EngineUnavailable, match="not loaded"):
        stand.answer("helper@v3")
    asked(stand, 3)
    assert held(stand) == {"v1", "v5", "v3"}


def test_what_a_request_uses_stays_and_the_next_is_refused_until_it_ends(stand: Stand) -> None:
    asked(stand, 2)
    asked(stand, 3)
    leases = [stand.routes.lease("t", ModelName.parse(f"helper@v{number}")) for number in (2, 3)]
    with pytest.raises(EngineUnavailable, match=r"holds 3 adapters and may hold 5 \(RATCHET_ENGINE_ADAPTERS"):
        asked(stand, 4)
    assert held(stand) == {"v1", "v2", "v3"}
    leases[1].release()
    version = replace(stand.ledger.version(5), alias="v5")
    stand.controller.ensure_loaded(version)
    assert held(stand) == {"v1", "v2", "v5"}
    leases[0].release()


def test_more_aliases_than_slots_are_reported_and_served_when_one_is_free(stand: Stand) -> None:
    assert stand.serve(stand.ledger.version(2), "canary")
    assert stand.serve(stand.ledger.version(3), "beta")
    v4 = stand.ledger.version(4)
    assert not stand.serve(v4, seconds=0.3)
    version, error = stand.ledger.wait_recorded(lambda _, error: error is not None)
    assert version == "ver_1"
    assert "RATCHET_ENGINE_ADAPTERS" in (error or "")
    assert stand.answer()[0] == 1
    with stand.ledger.changed:
        del stand.ledger.aliases["beta"]
    assert stand.controller.wait_serving("asst_1", "champion", "ver_4", PATIENCE)
    assert held(stand) == {"v1", "v2", "v4"}


def test_adapters_of_evaluations_take_slots(stand: Stand, adapter: Any, tmp_path: Path) -> None:
    asked(stand, 2)
    asked(stand, 3)
    with EngineClient(stand.engine.url) as client:
        for number in range(3):
            client.load(f"cand-upd_{number}-1", adapter(tmp_path / f"candidate-{number}"))
    # Three of five slots are an evaluation's: two are left.
    asked(stand, 4)
    assert held(stand) == {"v1", "v4", "upd_0", "upd_1", "upd_2"}


def test_each_version_asked_for_twice_is_loaded_once(stand: Stand) -> None:
    v2 = asked(stand, 2)
    stand.controller.ensure_loaded(v2)
    assert stand.engine.count("load", v2.served_name) == 1
