"""The swap controller against real HTTP servers that behave as engines do, with real adapter folders."""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domain.demonstration import Message
from domain.errors import CorruptArtifact, EngineUnavailable
from domain.version import ModelName, VersionKind
from serving.client import EngineClient
from serving.controller import SwapController
from serving.fleet import Fleet
from serving.replica import Replica as EngineState
from serving.replica import WantedVersion
from serving.routes import Endpoint, Lease, RouteTable
from tests.unit.serving.conftest import PATIENCE

HI = [Message(role="user", content="hi")]


@dataclass(frozen=True)
class Version:
    number: int
    manifest_sha256: str | None
    served_name: str
    alias: str = "champion"
    assistant_id: str = "asst_1"
    assistant_name: str = "helper"
    team_id: str = "t"
    base_model: str = "small"
    kind: VersionKind = "adapter"
    checkpoint_id: str | None = None

    @property
    def version_id(self) -> str:
        return f"ver_{self.number}"

    @property
    def engine_base(self) -> str:
        return self.checkpoint_id or self.base_model


@dataclass(frozen=True)
class Replica:
    url: str
    base_model: str = "small"
    model_name: str = "base"


class Ledger:
    """What the database and the artifact store say."""

    def __init__(self, root: Path, write: Callable[..., Path]) -> None:
        self.root = root
        self.write = write
        self.changed = threading.Condition()
        self.aliases: dict[str, Version] = {"champion": Version(0, None, "base", kind="base")}
        self.replicas: list[Replica] = []
        self.recorded: list[tuple[str, str, str | None, str | None]] = []
        self.served_before: list[Version] = []
        self.verified: list[str] = []
        self.in_use: Counter[str] = Counter()
        """Version ids whose files may not go, and how often that is so."""
        self.demanded: list[Sequence[str]] = []
        self.problems: dict[str, str] = {}
        self.mistaken: set[str] = set()
        """Urls of engines that run something else than they are known for."""
        self.unforeseen: dict[str, Exception] = {}
        """Version id -> what looking for its files ends with."""
        self.away = False

    def version(self, number: int, **adapter: Any) -> Version:
        folder = self.write(self.root / f"ver_{number}", **adapter)
        sha256 = hashlib.sha256(
            (folder / "adapter_model.safetensors").read_bytes() + bytes([number])
        ).hexdigest()
        return Version(number, sha256, f"helper-v{number}-{sha256[:8]}")

    def wanted(self) -> Sequence[Version]:
        with self.changed:
            if self.away:
                raise ConnectionError("the database is away")
            return [replace(version, alias=alias) for alias, version in self.aliases.items()]

    def served(self) -> Sequence[Version]:
        return list(self.served_before)

    def known(self, mistaken: Collection[str]) -> Sequence[Replica]:
        with self.changed:
            self.mistaken = set(mistaken)
            self.changed.notify_all()
            return list(self.replicas)

    def point(self, version: Version, alias: str = "champion") -> None:
        with self.changed:
            self.aliases[alias] = version

    def verify(self, version_id: str, sha256: str) -> Path:
        with self.changed:
            self.verified.append(version_id)
            self.changed.notify_all()
        if version_id in self.unforeseen:
            raise self.unforeseen[version_id]
        folder = self.root / version_id
        if not (folder / "adapter_model.safetensors").is_file():
            raise CorruptArtifact(f"{version_id}: adapter_model.safetensors is missing.")
        return folder

    @contextmanager
    def held(self, version_id: str) -> Iterator[None]:
        self._count_use(version_id, 1)
        try:
            yield
        finally:
            self._count_use(version_id, -1)

    def _count_use(self, version_id: str, change: int) -> None:
        with self.changed:
            self.in_use[version_id] += change

    def uses(self) -> dict[str, int]:
        with self.changed:
            return dict(+self.in_use)

    def demand(self, version_ids: Sequence[str]) -> Mapping[str, str]:
        with self.changed:
            self.demanded.append(version_ids)
            self.changed.notify_all()
            return dict(self.problems)

    def record(self, assistant_id: str, alias: str, version_id: str | None, error: str | None) -> None:
        if self.away:
            raise ConnectionError("the database is away")
        with self.changed:
            self.recorded.append((assistant_id, alias, version_id, error))
            self.changed.notify_all()

    def wait_recorded(
        self, condition: Callable[[str | None, str | None], bool]
    ) -> tuple[str | None, str | None]:
        """The newest record of champion, once it satisfies the condition."""

        def newest() -> tuple[str | None, str | None] | None:
            for _, alias, version_id, error in reversed(self.recorded):
                if alias == "champion":
                    return (version_id, error) if condition(version_id, error) else None
            return None

        with self.changed:
            assert self.changed.wait_for(lambda: newest() is not None, PATIENCE), self.recorded
            found = newest()
        assert found is not None
        return found


class Stand:
    """Engines, ledger, routes and a running controller."""

    def __init__(self, ledger: Ledger, engines: list[Any], config: Mapping[str, Any]) -> None:
        self.ledger = ledger
        self.engines = engines
        self.config = config
        self.max_rank: int | None = None
        self.slots = 64
        self.poll_seconds = 0.05
        self.routes = RouteTable()
        ledger.replicas = [Replica(engine.url) for engine in engines]
        self._stack = ExitStack()
        self.controller: SwapController

    @property
    def engine(self) -> Any:
        return self.engines[0]

    def start(self, idle_seconds: float = 0.0) -> "Stand":
        self.routes = RouteTable()
        self.controller = self._stack.enter_context(
            SwapController(
                wanted=self.ledger.wanted,
                served=self.ledger.served,
                replicas=self.ledger.known,
                verify=self.ledger.verify,
                held=self.ledger.held,
                base_config=lambda name: self.config,
                record=self.ledger.record,
                demand=self.ledger.demand,
                routes=self.routes,
                max_rank=self.max_rank,
                slots=self.slots,
                poll_seconds=self.poll_seconds,
                idle_seconds=idle_seconds,
            )
        )
        return self

    def start_on_base(self, idle_seconds: float = 0.0) -> None:
        """Started, and v0 serves."""
        self.start(idle_seconds)
        assert self.controller.wait_serving("asst_1", "champion", "ver_0", PATIENCE)

    def stop(self) -> None:
        self._stack.close()

    def serve(self, version: Version, alias: str = "champion", seconds: float = PATIENCE) -> bool:
        self.ledger.point(version, alias)
        self.controller.nudge()
        return self.controller.wait_serving("asst_1", alias, version.version_id, seconds)

    def answer(self, model: str = "helper") -> tuple[int, str]:
        """(version number of the lease, what the engine said)."""
        with (
            self.routes.lease("t", ModelName.parse(model)) as lease,
            EngineClient(lease.url) as client,
        ):
            return lease.version_number, client.chat(lease.engine_model, HI, 4)

    def lease_on_demand(self, version: Version) -> Lease:
        """Brought up and held. With little grace or none it may be gone again before it is leased."""
        while True:
            self.controller.ensure_loaded(version)
            try:
                return self.routes.lease("t", ModelName.parse(f"helper@v{version.number}"))
            except EngineUnavailable:
                continue


def settle(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def stand(tmp_path: Path, adapter: Any, engine: Any, base_config: Any) -> Iterator[Stand]:
    stand = Stand(Ledger(tmp_path, adapter), [engine], base_config)
    yield stand
    stand.stop()


@pytest.fixture
def pair(tmp_path: Path, adapter: Any, engines: Any, base_config: Any) -> Iterator[Stand]:
    stand = Stand(Ledger(tmp_path, adapter), [engines(), engines()], base_config)
    yield stand
    stand.stop()


def test_the_base_needs_no_loading(stand: Stand) -> None:
    stand.start_on_base()
    assert stand.answer() == (0, "base says hi")
    assert stand.engine.count("load") == 0
    assert stand.ledger.wait_recorded(lambda version, _: version == "ver_0") == ("ver_0", None)


def test_a_new_version_is_loaded_probed_routed_and_recorded(stand: Stand) -> None:
    v1 = stand.ledger.version(1)
    stand.start()
    assert stand.serve(v1)
    assert stand.answer() == (1, f"{v1.served_name} says hi")
    assert stand.answer("helper@v1")[0] == 1
    assert stand.ledger.wait_recorded(lambda version, _: version == "ver_1") == ("ver_1", None)
    calls = [call for call in stand.engine.calls if call[1] == v1.served_name]
    assert calls[:2] == [("load", v1.served_name), ("completions", v1.served_name)]
    assert stand.engine.adapters == {v1.served_name: str(stand.ledger.root / "ver_1")}


def test_the_old_version_is_unloaded_only_when_nobody_holds_it(stand: Stand) -> None:
    v1, v2 = stand.ledger.version(1), stand.ledger.version(2)
    stand.start()
    assert stand.serve(v1)
    held = stand.routes.lease("t", ModelName.parse("helper"))
    assert stand.serve(v2)
    assert stand.answer()[0] == 2
    # Two whole rounds later it is still there.
    rounds = stand.engine.lists
    stand.engine.wait_for(lambda: stand.engine.lists > rounds + 2)
    assert v1.served_name in stand.engine.adapters
    assert stand.routes.leases(Endpoint(held.url, held.engine_model)) == 1
    held.release()
    stand.engine.wait_for(lambda: v1.served_name not in stand.engine.adapters)
    assert stand.answer()[0] == 2


def test_an_idle_version_stays_for_its_grace(stand: Stand) -> None:
    v1, v2 = stand.ledger.version(1), stand.ledger.version(2)
    stand.start(idle_seconds=60)
    assert stand.serve(v1)
    assert stand.serve(v2)
    rounds = stand.engine.lists
    stand.engine.wait_for(lambda: stand.engine.lists > rounds + 3)
    assert stand.engine.count("unload") == 0
    assert stand.answer("helper@v1")[0] == 1


def test_files_stay_for_as_long_as_an_engine_holds_the_adapter(pair: Stand) -> None:
    pair.start_on_base()
    first, second = pair.ledger.version(1), pair.ledger.version(2)
    for version in (first, second):
        pair.serve(version)
        settle(lambda name=version.served_name: all(name in engine.adapters for engine in pair.engines))
    settle(lambda: pair.ledger.uses() == {"ver_2": 2})
    # A controller that starts anew finds them loaded, and watches over the files all the same.
    verified = list(pair.ledger.verified)
    pair.stop()
    assert pair.ledger.uses() == {}
    pair.start()
    settle(lambda: pair.ledger.uses() == {"ver_2": 2})
    assert pair.ledger.verified == verified
    pair.ledger.replicas = [Replica(pair.engines[0].url)]
    settle(lambda: pair.ledger.uses() == {"ver_2": 1})


def test_files_that_did_not_serve_are_let_go(stand: Stand) -> None:
    stand.start_on_base()
    version = stand.ledger.version(1)
    stand.engine.refuse[version.served_name] = (500, "no memory")
    stand.ledger.point(version)
    stand.ledger.wait_recorded(lambda _, error: error is not None)
    settle(lambda: stand.ledger.uses() == {})


def test_one_version_under_two_aliases_is_kept_for_the_other(stand: Stand) -> None:
    v1, v2 = stand.ledger.version(1), stand.ledger.version(2)
    stand.start()
    assert stand.serve(v1)
    assert stand.serve(v1, "canary")
    assert stand.serve(v2)
    rounds = stand.engine.lists
    stand.engine.wait_for(lambda: stand.engine.lists > rounds + 3)
    assert stand.engine.count("unload") == 0
    assert stand.answer("helper@canary")[0] == 1


def test_corrupt_weights_are_never_loaded(stand: Stand, tensors: Any) -> None:
    weights = tensors()
    next(iter(weights.values()))[0, 0] = np.nan
    v1, v2 = stand.ledger.version(1), stand.ledger.version(2, tensors=weights)
    stand.start()
    assert stand.serve(v1)
    assert not stand.serve(v2, seconds=0.3)
    version, error = stand.ledger.wait_recorded(lambda version, error: error is not None)
    assert version == "ver_1"
    assert "NaN or infinity" in (error or "")
    assert stand.answer()[0] == 1
    assert stand.engine.count("load", v2.served_name) == 0


def test_files_that_fail_verification_are_never_loaded_nor_hammered(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.replica.FIRST_RETRY_SECONDS", 60.0)
    v1 = stand.ledger.version(1)
    (stand.ledger.root / "ver_1" / "adapter_model.safetensors").unlink()
    stand.start_on_base()
    assert not stand.serve(v1, seconds=0.5)
    version, error = stand.ledger.wait_recorded(lambda version, error: error is not None)
    assert (version, error) == ("ver_0", "ver_1: adapter_model.safetensors is missing.")
    assert stand.engine.count("load") == 0
    # Many rounds in half a second, one attempt: the next is not due yet.
    assert stand.ledger.verified == ["ver_1"]
    with pytest.raises(CorruptArtifact, match="is missing"):
        stand.controller.ensure_loaded(v1)
    assert stand.ledger.verified == ["ver_1"]


def test_a_refused_load_is_retried_later_and_then_serves(stand: Stand) -> None:
    v1 = stand.ledger.version(1)
    stand.engine.refuse["helper-v1"] = (500, "out of slots")
    stand.start_on_base()
    assert not stand.serve(v1, seconds=0.3)
    _, error = stand.ledger.wait_recorded(lambda version, error: error is not None)
    assert "out of slots" in (error or "")
    stand.engine.refuse.clear()
    assert stand.controller.wait_serving("asst_1", "champion", "ver_1", PATIENCE)
    assert stand.ledger.wait_recorded(lambda version, _: version == "ver_1") == ("ver_1", None)


def test_a_version_that_ends_with_an_unforeseen_error_waits_and_holds_up_no_other(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.replica.FIRST_RETRY_SECONDS", 0.2)
    v1, v2 = stand.ledger.version(1), stand.ledger.version(2)
    stand.ledger.unforeseen["ver_1"] = ZeroDivisionError("secret words")
    stand.start_on_base()
    stand.ledger.point(v1)
    assert stand.serve(v2, "canary")
    version, error = stand.ledger.wait_recorded(lambda _, error: error is not None)
    told = "The version could not be brought up (ZeroDivisionError); the API's log has the cause."
    assert (version, error) == ("ver_0", told)
    with pytest.raises(EngineUnavailable, match="ZeroDivisionError"):
        stand.controller.ensure_loaded(v1)
    settle(lambda: caplog.text.count("ZeroDivisionError); the API's log") >= 2)
    assert stand.ledger.verified.count("ver_1") >= 2
    assert caplog.text.count("Traceback") == caplog.text.count("secret words") == 1
    del stand.ledger.unforeseen["ver_1"]
    assert stand.controller.wait_serving("asst_1", "champion", "ver_1", PATIENCE)


def test_an_engine_whose_replies_make_no_sense_is_left_in_peace(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.replica.FIRST_RETRY_SECONDS", 60.0)
    v1 = stand.ledger.version(1)
    stand.engine.no_logprobs.add(v1.served_name)
    stand.start_on_base()
    assert not stand.serve(v1, seconds=0.3)
    _, error = stand.ledger.wait_recorded(lambda _, error: error is not None)
    assert "the reply has no logprobs" in (error or "")
    assert stand.engine.count("completions", v1.served_name) == 1
    assert stand.engine.adapters == {}


def test_a_round_that_breaks_is_repeated_in_its_time_only(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something is always to be loaded, and no attempt comes as far as being remembered."""
    rounds = threading.Semaphore(0)

    def broken(*_: Any) -> None:
        rounds.release()
        raise ZeroDivisionError

    monkeypatch.setattr("serving.controller.SwapController._load_missing", broken)
    stand.poll_seconds = 10 * PATIENCE
    stand.start()
    assert rounds.acquire(timeout=PATIENCE)
    assert not rounds.acquire(timeout=1)
    settle(lambda: not stand.controller._busy)
    stand.controller.nudge()
    assert rounds.acquire(timeout=PATIENCE)


def test_attempts_become_rarer(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.replica.time.monotonic", lambda: 1000.0)
    known = EngineState(Replica(engine.url), priorities=False)
    delays = []
    for _ in range(8):
        known.failed("helper-v1-00000000", EngineUnavailable("out of slots"))
        delays.append(known.failures["helper-v1-00000000"].retry_at - 1000.0)
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60]
    assert known.waiting("helper-v1-00000000") is not None
    monkeypatch.setattr("serving.replica.time.monotonic", lambda: 1060.0)
    assert known.waiting("helper-v1-00000000") is None


def test_a_version_whose_probe_fails_is_not_routed(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.replica.FIRST_RETRY_SECONDS", 60.0)
    v1 = stand.ledger.version(1)
    stand.engine.bad_probe.add(v1.served_name)
    stand.start_on_base()
    assert not stand.serve(v1, seconds=0.3)
    version, error = stand.ledger.wait_recorded(lambda version, error: error is not None)
    assert version == "ver_0"
    assert "not finite" in (error or "")
    assert stand.engine.adapters == {}


def test_an_engine_that_ignores_an_adapter_keeps_the_old_version(stand: Stand, tensors: Any) -> None:
    weights = {name: value + 0.5 for name, value in tensors().items()}
    v1, v2 = stand.ledger.version(1, tensors=weights), stand.ledger.version(2, tensors=weights)
    stand.start()
    assert stand.serve(v1)
    stand.engine.ignored.add(v2.served_name)
    assert not stand.serve(v2, seconds=0.3)
    version, error = stand.ledger.wait_recorded(lambda version, error: error is not None)
    assert version == "ver_1"
    assert "does not apply the adapter" in (error or "")
    assert stand.answer()[0] == 1
    stand.engine.wait_for(lambda: list(stand.engine.adapters) == [v1.served_name])


def test_a_rank_that_engines_do_not_serve_is_never_loaded(stand: Stand) -> None:
    stand.max_rank = 1
    v1 = stand.ledger.version(1)
    stand.start_on_base()
    assert not stand.serve(v1, seconds=0.3)
    _, error = stand.ledger.wait_recorded(lambda version, error: error is not None)
    assert "RATCHET_ENGINE_MAX_RANK" in (error or "")
    assert stand.engine.count("load") == 0


def test_a_restarted_engine_gets_its_adapters_back(stand: Stand) -> None:
    v1 = stand.ledger.version(1)
    stand.start()
    assert stand.serve(v1)
    stand.engine.forget_adapters()
    stand.engine.wait_for(lambda: stand.engine.count("load", v1.served_name) == 2)
    assert stand.controller.wait_serving("asst_1", "champion", "ver_1", PATIENCE)
    assert stand.answer()[0] == 1


def test_the_old_version_comes_back_too_while_the_new_one_cannot_load(stand: Stand) -> None:
    v1, v2 = stand.ledger.version(1), stand.ledger.version(2)
    (stand.ledger.root / "ver_2" / "adapter_config.json").write_text("{")
    stand.start()
    assert stand.serve(v1)
    assert not stand.serve(v2, seconds=0.2)
    stand.engine.forget_adapters()
    stand.engine.wait_for(lambda: stand.engine.count("load", v1.served_name) == 2)
    assert stand.controller.wait_serving("asst_1", "champion", "ver_1", PATIENCE)
    assert stand.answer()[0] == 1


def test_an_engine_that_goes_and_comes_back(stand: Stand) -> None:
    v1 = stand.ledger.version(1)
    stand.start()
    assert stand.serve(v1)
    stand.engine.stop()
    stand.engine.forget_adapters()
    assert not stand.serve(stand.ledger.version(2), seconds=0.3)
    _, error = stand.ledger.wait_recorded(lambda version, error: error is not None)
    assert "does not answer" in (error or "")
    stand.engine.start()
    assert stand.controller.wait_serving("asst_1", "champion", "ver_2", PATIENCE)
    assert stand.answer()[0] == 2


def test_a_version_by_number_is_loaded_on_demand_and_leaves_again(stand: Stand) -> None:
    v3 = replace(stand.ledger.version(3), alias="v3")
    stand.start_on_base()
    with pytest.raises(EngineUnavailable):
        stand.answer("helper@v3")
    held = stand.lease_on_demand(v3)
    assert held.engine_model == v3.served_name
    assert stand.answer()[0] == 0
    held.release()
    stand.engine.wait_for(lambda: stand.engine.adapters == {})


def test_on_demand_heals_what_an_engine_lost(stand: Stand) -> None:
    v1 = stand.ledger.version(1)
    stand.start(idle_seconds=60)
    assert stand.serve(v1)
    stand.engine.forget_adapters()
    stand.controller.ensure_loaded(v1)
    assert stand.answer() == (1, f"{v1.served_name} says hi")


def test_on_demand_needs_an_engine_of_the_base(stand: Stand) -> None:
    stand.start()
    with pytest.raises(
        EngineUnavailable, match="No inference engine is registered for the base model 'huge'"
    ):
        stand.controller.ensure_loaded(replace(stand.ledger.version(1), base_model="huge"))


def test_replicas_share_the_work(pair: Stand) -> None:
    v1 = pair.ledger.version(1)
    pair.start()
    assert pair.serve(v1)
    pair.engine.wait_for(lambda: len(endpoints(pair)) == 2)
    assert {pair.routes.lease("t", ModelName.parse("helper")).url for _ in range(4)} == {
        engine.url for engine in pair.engines
    }


def endpoints(stand: Stand) -> tuple[Endpoint, ...]:
    return stand.routes.routes.aliases["t", "helper", "champion"].endpoints


def test_a_replica_that_cannot_load_gets_no_requests(pair: Stand) -> None:
    v1 = pair.ledger.version(1)
    good, bad = pair.engines
    bad.refuse["helper-v1"] = (500, "out of slots")
    pair.start()
    assert pair.serve(v1)
    bad.wait_for(lambda: bad.count("load") > 0)
    assert [endpoint.url for endpoint in endpoints(pair)] == [good.url]
    told = pair.ledger.wait_recorded(lambda version, error: version == "ver_1" and error is not None)
    assert f"{bad.url} refused to load" in (told[1] or "")
    bad.refuse.clear()
    good.wait_for(lambda: len(endpoints(pair)) == 2)
    assert pair.ledger.wait_recorded(lambda _, error: error is None) == ("ver_1", None)


def test_a_replica_that_died_gets_no_requests_while_another_lives(pair: Stand) -> None:
    pair.start_on_base()
    gone, left = pair.engines
    gone.stop()
    left.wait_for(lambda: [endpoint.url for endpoint in endpoints(pair)] == [left.url])
    assert pair.answer()[0] == 0


def test_a_replica_that_comes_back_catches_up_by_itself(pair: Stand) -> None:
    """It was away while the alias moved: it gets no request until it holds what is wanted now."""
    v1, v2 = pair.ledger.version(1), pair.ledger.version(2)
    pair.start(idle_seconds=60)
    assert pair.serve(v1)
    killed, left = pair.engines
    left.wait_for(lambda: len(endpoints(pair)) == 2)
    killed.stop()
    killed.forget_adapters()
    assert pair.serve(v2)
    assert [endpoint.url for endpoint in endpoints(pair)] == [left.url]
    assert pair.answer() == (2, f"{v2.served_name} says hi")
    killed.start()
    killed.wait_for(lambda: len(endpoints(pair)) == 2)
    assert list(killed.adapters) == [v2.served_name]
    assert {endpoint.engine_model for endpoint in endpoints(pair)} == {v2.served_name}


def test_an_engine_whose_url_another_model_has_taken_gets_neither_adapters_nor_requests(pair: Stand) -> None:
    v1 = pair.ledger.version(1)
    pair.start()
    assert pair.serve(v1)
    left, taken = pair.engines
    left.wait_for(lambda: len(endpoints(pair)) == 2)
    loads = taken.count("load")
    with taken.lock:
        taken.base = "huge"
        taken.adapters.clear()
    left.wait_for(lambda: [endpoint.url for endpoint in endpoints(pair)] == [left.url])
    settle(lambda: pair.ledger.mistaken == {taken.url})
    assert pair.answer() == (1, f"{v1.served_name} says hi")
    rounds = taken.lists
    taken.wait_for(lambda: taken.lists > rounds + 3)
    assert (taken.count("load"), taken.adapters) == (loads, {})
    # Known for what it runs, it answers for assistants on that base.
    with pair.ledger.changed:
        pair.ledger.replicas[1] = Replica(taken.url, base_model="huge", model_name="huge")
    pair.controller.ensure_loaded(
        Version(0, None, "huge", kind="base", assistant_name="other", base_model="huge")
    )
    assert pair.answer("other@v0") == (0, "huge says hi")
    settle(lambda: pair.ledger.mistaken == set())


def test_a_model_that_comes_back_to_its_url_is_probed_anew(stand: Stand) -> None:
    v1 = stand.ledger.version(1)
    stand.start(idle_seconds=60)
    assert stand.serve(v1)
    with stand.engine.lock:
        stand.engine.base = "huge"
        stand.engine.adapters.clear()
    settle(lambda: not stand.routes.routes.aliases)
    assert stand.ledger.wait_recorded(lambda version, _: version is None) == (
        None,
        f"The inference engine at {stand.engine.url} serves 'base' no longer.",
    )
    settle(lambda: stand.ledger.uses() == {})
    with stand.engine.lock:
        stand.engine.base = "base"
    assert stand.controller.wait_serving("asst_1", "champion", "ver_1", PATIENCE)
    assert stand.engine.count("load", v1.served_name) == 2
    assert stand.answer()[0] == 1


def test_a_replica_that_is_added_gets_what_serves(pair: Stand) -> None:
    added = pair.ledger.replicas.pop()
    v1 = pair.ledger.version(1)
    pair.start()
    assert pair.serve(v1)
    assert pair.engines[1].adapters == {}
    with pair.ledger.changed:
        pair.ledger.replicas.append(added)
    pair.engines[1].wait_for(lambda: len(endpoints(pair)) == 2)
    assert list(pair.engines[1].adapters) == [v1.served_name]


def test_private_adapters_of_an_evaluation_are_left_alone(stand: Stand, adapter: Any, tmp_path: Path) -> None:
    with EngineClient(stand.engine.url) as client:
        client.load("cand-upd_1-7", adapter(tmp_path / "candidate"))
        client.load("bare:helper-v2-ffffffff", adapter(tmp_path / "bare"))
        client.load("gone-v3-0123abcd", adapter(tmp_path / "left-over"))
    stand.start()
    # A served name that nobody wants (of an earlier run of the API) is cleared away.
    private = ["cand-upd_1-7", "bare:helper-v2-ffffffff"]
    stand.engine.wait_for(lambda: list(stand.engine.adapters) == private)
    rounds = stand.engine.lists
    stand.engine.wait_for(lambda: stand.engine.lists > rounds + 3)
    assert list(stand.engine.adapters) == private


def test_a_controller_that_starts_anew_takes_over_what_is_loaded(stand: Stand) -> None:
    v1 = stand.ledger.version(1)
    stand.start_on_base()
    assert stand.serve(v1)
    stand.stop()
    stand.start()
    assert stand.controller.wait_serving("asst_1", "champion", "ver_1", PATIENCE)
    assert stand.engine.count("load", v1.served_name) == 1
    assert stand.engine.count("completions", v1.served_name) == 2


def test_serving_goes_on_while_the_ledger_is_away(stand: Stand) -> None:
    v1 = stand.ledger.version(1)
    stand.start_on_base()
    stand.ledger.away = True
    stand.ledger.point(v1)
    assert not stand.controller.wait_serving("asst_1", "champion", "ver_1", 0.2)
    assert stand.answer()[0] == 0
    stand.ledger.away = False
    assert stand.controller.wait_serving("asst_1", "champion", "ver_1", PATIENCE)
    assert stand.ledger.wait_recorded(lambda version, _: version == "ver_1") == ("ver_1", None)


def test_a_replica_that_loses_its_adapters_gets_no_requests_while_the_ledger_is_away(
    pair: Stand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.replica.LONGEST_RETRY_SECONDS", 0.1)
    v1 = pair.ledger.version(1)
    pair.start()
    assert pair.serve(v1)
    restarted, left = pair.engines
    left.wait_for(lambda: len(endpoints(pair)) == 2)
    pair.ledger.unforeseen["ver_1"] = ConnectionError("the database is away")
    pair.ledger.away = True
    restarted.forget_adapters()
    left.wait_for(lambda: [endpoint.url for endpoint in endpoints(pair)] == [left.url])
    assert pair.answer() == (1, f"{v1.served_name} says hi")
    rounds = left.lists
    left.wait_for(lambda: left.lists > rounds + 3)
    assert caplog.text.count("could not read the ledger") == 1
    pair.ledger.unforeseen.clear()
    pair.ledger.away = False
    left.wait_for(lambda: len(endpoints(pair)) == 2)
    assert caplog.text.count("could not record what serves") <= 1


def test_nothing_is_unloaded_while_the_ledger_is_away(stand: Stand) -> None:
    """Another process may have moved an alias to what seems idle here."""
    v1, v2 = stand.ledger.version(1), stand.ledger.version(2)
    stand.start()
    assert stand.serve(v1)
    held = stand.routes.lease("t", ModelName.parse("helper"))
    assert stand.serve(v2)
    stand.ledger.away = True
    settle(lambda: not stand.controller._informed)
    rounds = stand.engine.lists
    stand.engine.wait_for(lambda: stand.engine.lists > rounds + 1)
    held.release()
    rounds = stand.engine.lists
    stand.engine.wait_for(lambda: stand.engine.lists > rounds + 3)
    assert v1.served_name in stand.engine.adapters
    stand.ledger.away = False
    stand.engine.wait_for(lambda: list(stand.engine.adapters) == [v2.served_name])


def test_waiting_gives_up_in_time(stand: Stand) -> None:
    stand.start()
    assert not stand.controller.wait_serving("asst_1", "champion", "ver_9", 0.1)
    assert not stand.controller.wait_serving("asst_2", "champion", "ver_0", 0.1)


def test_no_request_fails_or_mixes_versions_while_versions_swap(pair: Stand) -> None:
    """Eight clients chat without pause while the alias moves eighteen times between three versions, with no
    grace for idle versions at all."""
    versions = [pair.ledger.version(number) for number in (1, 2, 3)]
    names = {version.number: version.served_name for version in versions}
    pair.start()
    assert pair.serve(versions[0])
    stop = threading.Event()
    answered = threading.Condition()
    answers: Counter[int] = Counter()
    problems: list[str] = []

    def chat() -> None:
        with ExitStack() as stack:
            clients = {engine.url: stack.enter_context(EngineClient(engine.url)) for engine in pair.engines}
            while not stop.is_set():
                try:
                    with pair.routes.lease("t", ModelName.parse("helper")) as lease:
                        said = clients[lease.url].chat(lease.engine_model, HI, 4)
                        if said != f"{names[lease.version_number]} says hi":
                            problems.append(f"v{lease.version_number} said {said}")
                    with answered:
                        answers[lease.version_number] += 1
                        answered.notify_all()
                except EngineUnavailable as error:
                    problems.append(error.message)

    threads = [threading.Thread(target=chat) for _ in range(8)]
    for thread in threads:
        thread.start()
    moves = [versions[move % 3] for move in range(1, 19)]
    served = []
    for version in moves:
        served.append(pair.serve(version))
        with answered:
            wanted = answers[version.number] + 5
            served.append(
                answered.wait_for(lambda number=version.number, n=wanted: answers[number] >= n, PATIENCE)
            )
    stop.set()
    for thread in threads:
        thread.join()
    assert all(served)
    assert problems == []
    assert sum(engine.failed_chats for engine in pair.engines) == 0
    last = moves[-1].served_name
    for engine in pair.engines:
        engine.wait_for(lambda engine=engine: list(engine.adapters) == [last])
        assert engine.count("unload") > 0


def test_what_waits_for_a_version_finds_it_routed(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine gets back what serves: from the moment that this is told, requests are answered."""
    v1 = stand.ledger.version(1)
    stand.poll_seconds = 10 * PATIENCE
    stand.start(idle_seconds=60)
    assert stand.serve(v1)
    acknowledged, go_on = threading.Event(), threading.Event()
    acknowledge = Fleet.acknowledge

    def halting(fleet: Fleet, replica: EngineState, version: WantedVersion) -> None:
        acknowledge(fleet, replica, version)
        acknowledged.set()
        assert go_on.wait(PATIENCE)

    monkeypatch.setattr(Fleet, "acknowledge", halting)
    stand.engine.forget_adapters()
    stand.controller.nudge()
    try:
        assert acknowledged.wait(PATIENCE)
        assert stand.controller.wait_serving("asst_1", "champion", "ver_1", 0.0)
        assert stand.answer() == (1, f"{v1.served_name} says hi")
    finally:
        go_on.set()


def test_a_round_for_which_there_is_no_thread_is_made_up_for(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("swap-http"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        stand.start()
        settle(lambda: "could not reconcile" in caplog.text)
    assert stand.controller.wait_serving("asst_1", "champion", "ver_0", PATIENCE)
