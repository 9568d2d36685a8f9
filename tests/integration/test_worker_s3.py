"""Updates whose version files are kept on a real S3 server: the worker, dispatcher and broker are processes,
and the swap controller serves from a home of its own, as on another machine."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from api.swaps import make_controller
from artifacts.opening import open_store
from cli.main import app
from domain.settings import Settings
from domain.version import CHAMPION
from registry import aliases, assistants, serving, versions
from registry.retention import publishing_id
from registry.session import make_reading_sessions
from registry.tables import Version
from serving.routes import RouteTable
from tests.conftest_s3 import Prefix
from tests.worker_stack.s3_gate import Gate
from tests.worker_stack.stack import PATIENCE, TEAM, Stack, running_stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RETRY_SECONDS = 0.5
CLOCK = 0.002
"""What the ledger's clock leaves out, in seconds."""


@dataclass(frozen=True)
class Place:
    """A stack whose versions are kept in `bucket`; its worker's way there leads through `gate`."""

    stack: Stack
    bucket: Prefix
    gate: Gate

    @property
    def api(self) -> Settings:
        return Settings(
            home=self.stack.home / "api", database_url=self.stack.url, artifacts_url=self.bucket.url
        )

    def fetched(self, home: Path) -> list[str]:
        """Ids of the versions with a local copy."""
        folder = home / "artifacts-cache"
        return sorted(path.name for path in folder.glob("ver_*")) if folder.exists() else []

    def weights(self, version: Version) -> str:
        """The key of its tensors."""
        files = {file["path"]: file["sha256"] for file in version.manifest["files"]}
        return f"{version.id}/{files['adapter_model.safetensors']}"

    def answers(self, assistant_id: str) -> str | None:
        """Id of the version that answers for the champion, by the controller's own word."""
        with self.stack.sessions.begin() as session:
            state = serving.serving_state(session, assistant_id, CHAMPION)
            return None if state is None else state.version_id

    def knows(self, model: str) -> set[str]:
        """The skills behind the prompts that the engine's model can answer."""
        return {prompt.split()[0] for prompt in self.stack.engine.loaded[model]}


Open = Callable[..., Place]


@pytest.fixture
def opened(s3_server: str, s3_prefix: Prefix) -> Iterator[Open]:
    """Starts the place; keyword arguments are further settings of its processes. No lease runs out but of a
    worker that died, unless it is short."""
    with ExitStack() as everything:
        gate = Gate(s3_server)
        everything.callback(gate.stop)

        def start(lease_seconds: float = 30.0, **settings: str) -> Place:
            environment = {
                "AWS_ENDPOINT_URL": gate.url,
                "RATCHET_ARTIFACTS_URL": s3_prefix.url,
                "RATCHET_RETRY_SECONDS": str(RETRY_SECONDS),
                **settings,
            }
            stack = everything.enter_context(
                running_stack(lease_seconds=lease_seconds, environment=environment)
            )
            stack.stop_serving()
            place = Place(stack, s3_prefix, gate)
            everything.enter_context(serving_from(place))
            return place

        yield start


@contextmanager
def serving_from(place: Place) -> Iterator[None]:
    """The real swap controller, in this process and with an empty home."""
    reads = make_reading_sessions(place.stack.db)
    store = open_store(place.api)
    with make_controller(place.api, place.stack.sessions, reads, store, RouteTable()):
        yield


def setbacks(stack: Stack, update_id: str) -> list[tuple[int, str, float, float]]:
    """(how many in a row, error's code, bounds of the seconds until the next try) of each.

    It waits from a moment between the two events that give the update back.
    """
    events = stack.events(update_id)
    return [
        (
            event.data["setbacks"],
            event.data["error"]["code"],
            event.data["not_before"] - event.created_at,
            event.data["not_before"] - queued.created_at,
        )
        for queued, event in pairwise(events)
        if "setbacks" in event.data
    ]


def test_a_killed_claim_two_updates_in_a_row_and_what_is_swept(opened: Open, tmp_path: Path) -> None:
    place = opened(
        lease_seconds=10.0,
        RATCHET_FAILPOINT=f"worker.files_published kill {tmp_path / 'marker'}",
        RATCHET_ARTIFACTS_CACHE_BYTES="1",
    )
    stack, bucket = place.stack, place.bucket
    assistant = stack.assistant()
    first = stack.teach(assistant, "route")
    second = stack.teach(assistant, "refund")
    third = stack.teach(assistant, "limit")
    stack.start_broker()
    stack.start_worker()
    dispatcher = stack.start_dispatcher()

    # Killed with all files in the bucket: the next claim publishes them once more, under its own id.
    assert stack.finished(first).status == "succeeded"
    assert (tmp_path / "marker").exists()
    assert stack.update(first).fence > 1
    assert stack.steps(first) == [1, 2, 3, 4]

    # The second starts from the first one's adapter and the third from the second's, each fetched.
    assert stack.finished(third).status == "succeeded"
    made = stack.versions()
    assert [version.update_id for version in made] == [first, second, third]
    assert stack.champion(assistant) == 3
    assert place.fetched(stack.home) == [made[1].id]  # which made the first one go
    stack.until(lambda: place.answers(assistant) == made[2].id, "the champion to answer")
    assert made[2].id in place.fetched(stack.home / "api")
    assert place.knows(made[2].served_name) == {"route", "refund", "limit"}
    assert not (stack.home / "artifacts").exists()
    left_behind = bucket.ids() - {version.id for version in made}
    assert left_behind
    assert left_behind <= {publishing_id(first, fence) for fence in range(1, stack.update(first).fence)}

    # The dispatcher sweeps when it starts.
    dispatcher.terminate()
    assert dispatcher.wait(PATIENCE) == 0
    stack.environment |= {"RATCHET_ARTIFACTS_GRACE_HOURS": "0.0001", "RATCHET_KEEP_VERSIONS": "1"}
    stack.until(lambda: _older_than_the_grace(stack, made), "the end of the grace")
    stack.start_dispatcher()
    kept = {version.id for version in made[1:]}  # the champion, and where a rollback would go
    stack.until(lambda: bucket.ids() == kept, "the sweep")
    assert [version.pruned_at is not None for version in stack.versions()] == [True, False, False]
    checked = CliRunner().invoke(app, ["fsck", "--json"], env=stack.environment)
    assert (checked.exit_code, '"versions": 2' in checked.stdout) == (0, True), checked.output


def _older_than_the_grace(stack: Stack, made: list[Version]) -> bool:
    """0.0001 hours are 0.36 s, and the bucket's clock counts whole seconds."""
    with stack.sessions.begin() as session:
        return (time.time() - max(session.scalars(select(Version.created_at)))) > 2


def test_a_bucket_that_is_away_is_a_counted_setback(opened: Open) -> None:
    place = opened(STANDIN_S3_SECONDS="2")
    stack, gate = place.stack, place.gate
    assistant = stack.assistant()
    stack.start_all()

    gate.mode = "failing"
    first = stack.teach(assistant, "route")
    stack.until(lambda: setbacks(stack, first), "the first setback")
    assert place.bucket.keys() == []
    gate.mode = "open"
    assert stack.finished(first).status == "succeeded"
    assert stack.steps(first) == [1, 2, 3, 4]  # what was trained is not trained again
    assert stack.champion(assistant) == 1

    gate.mode = "silent"
    second = stack.teach(assistant, "refund")
    stack.until(lambda: setbacks(stack, second), "the first setback")
    assert stack.steps(second) == []  # it was the parent's files that did not come
    gate.mode = "open"
    assert stack.finished(second).status == "succeeded"
    second_id = stack.versions()[1].id
    stack.until(lambda: place.answers(assistant) == second_id, "the champion to answer")

    for update_id in (first, second):
        counted = setbacks(stack, update_id)
        assert [(number, code) for number, code, _, _ in counted] == [
            (number, "artifacts_unavailable") for number in range(1, len(counted) + 1)
        ]
        for number, _, least, most in counted:
            assert least - CLOCK <= RETRY_SECONDS * 2 ** (number - 1) <= most + CLOCK
        assert stack.update(update_id).fence == len(counted) + 1
    assert len(stack.versions()) == 2


def test_a_flipped_byte_in_the_bucket_is_found_before_anything_uses_it(opened: Open) -> None:
    place = opened()
    stack, bucket = place.stack, place.bucket
    assistant = stack.assistant()
    stack.start_all()
    assert stack.finished(stack.teach(assistant, "route")).status == "succeeded"
    assert stack.finished(stack.teach(assistant, "refund", publish="hold")).status == "succeeded"
    first, second = stack.versions()
    stack.until(lambda: place.answers(assistant) == first.id, "the champion to answer")

    bucket.flip(place.weights(second))
    with stack.sessions.begin() as session:
        owner = assistants.get_assistant(session, TEAM, assistant)
        target = versions.get_version(session, owner, 2)
        move = {"kind": "promote", "reason": "", "actor": "user", "expected_revision": None}
        aliases.move_alias(session, owner, CHAMPION, target, **move)

    def problem() -> str:
        with stack.sessions.begin() as session:
            state = serving.serving_state(session, assistant, CHAMPION)
            return (state.error if state is not None else None) or ""

    stack.until(lambda: "adapter_model.safetensors differs from its sha256" in problem(), "the finding")
    assert place.answers(assistant) == first.id
    assert second.served_name not in stack.engine.ever_loaded
    third = stack.finished(stack.teach(assistant, "limit"))  # it would train from v2
    assert (third.status, third.error["code"]) == ("failed", "corrupt_artifact")
    assert third.setbacks == 0
    assert second.id not in [*place.fetched(stack.home), *place.fetched(stack.home / "api")]

    bucket.flip(place.weights(second))
    stack.until(lambda: place.answers(assistant) == second.id, "the whole version")
    assert place.knows(second.served_name) == {"route", "refund"}
