"""One inference engine as the swap controller knows it, and how a version is brought up on it."""

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from domain.errors import CorruptArtifact, EngineUnavailable, RatchetError
from domain.version import VersionKind
from serving.client import EngineClient
from serving.routes import Endpoint
from serving.validation import validate_adapter

logger = logging.getLogger(__name__)

SERVED_NAME = re.compile(r"^[^:]+-v\d+-[0-9a-f]{8}$")
"""`<assistant>-v<n>-<8 hex of the manifest's sha256>`: adapters of the controller's own. Others on the
engine (an evaluation's private ones, a checkpoint's bare model) are not its business."""
NO_SLOT = "no_slot"
"""Code of the EngineUnavailable when an engine holds as many adapters as it may."""
OTHER_MODEL = "other_model"
"""Code of the EngineUnavailable when an engine runs something else than it is known for."""
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 1.0, 60.0


class WantedVersion(Protocol):
    """A version that must answer for `assistant_name@alias` (`v7` when it was asked for by number)."""

    @property
    def assistant_id(self) -> str: ...
    @property
    def assistant_name(self) -> str: ...
    @property
    def team_id(self) -> str: ...
    @property
    def alias(self) -> str: ...
    @property
    def version_id(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def served_name(self) -> str: ...
    @property
    def kind(self) -> VersionKind: ...
    @property
    def manifest_sha256(self) -> str | None:
        """None for the bare base model."""

    @property
    def base_model(self) -> str: ...
    @property
    def checkpoint_id(self) -> str | None:
        """The full version that it is or lies on; None where that is the base model itself."""

    @property
    def engine_base(self) -> str:
        """What an engine must run to answer for it: its checkpoint, or else the base model."""


class KnownReplica(Protocol):
    """An inference engine as the ledger knows it."""

    @property
    def url(self) -> str: ...
    @property
    def base_model(self) -> str:
        """What it runs: a base model's name or a full version's id."""

    @property
    def model_name(self) -> str:
        """Under which it serves that."""


@dataclass(frozen=True)
class Files:
    """Where versions' files come from."""

    verify: Callable[[str, str], Path]
    """(version id, manifest sha256) -> its folder, every byte compared; raises CorruptArtifact."""
    held: Callable[[str], AbstractContextManager[None]]
    """Version id -> while the block runs, that folder stays."""
    base_config: Callable[[str], Mapping[str, Any]]
    """Base model's name -> its config.json."""
    max_rank: int | None
    """Of adapters that the engines serve; None: any."""


@dataclass
class Failure:
    error: RatchetError
    times: int
    retry_at: float
    """time.monotonic"""


class Replica:
    """`lock` serialises what changes the engine; `acknowledged`, `failures` and `unreachable` are guarded
    by the controller's lock."""

    def __init__(self, known: KnownReplica, priorities: bool) -> None:
        self.url = known.url
        self.base_model = known.base_model
        self.model_name = known.model_name
        self.client = EngineClient(known.url, priorities=priorities)
        self.lock = threading.Lock()
        self.acknowledged: set[str] = set()
        """Engine models that answered a probe."""
        self.failures: dict[str, Failure] = {}
        self.unreachable: EngineUnavailable | None = None
        self._base: tuple[float, ...] | None = None
        self._uses: dict[str, ExitStack] = {}
        """By engine model: keeps the files of what the engine holds, should it read them again."""

    def engine_model(self, wanted: WantedVersion) -> str:
        return wanted.served_name if wanted.kind == "adapter" else self.model_name

    def endpoint(self, wanted: WantedVersion) -> Endpoint:
        return Endpoint(self.url, self.engine_model(wanted))

    def models(self) -> set[str]:
        """What the engine answers to; `lock` is held.

        Raises EngineUnavailable, with code `other_model` when what it runs is no longer among them: another
        server has taken its place, and nothing that was known of this one holds.
        """
        present = self.client.models()
        if self.model_name not in present:
            self.forget()
            raise EngineUnavailable(
                f"The inference engine at {self.url} serves '{self.model_name}' no longer.", code=OTHER_MODEL
            )
        return present

    def bring_up(self, wanted: WantedVersion, present: set[str], files: Files) -> None:
        """Load the version unless it is among the engine's `present` models, and probe it; `lock` is held.

        Files are verified before every load, and an adapter's stay until it is unloaded. Raises
        EngineUnavailable, CorruptArtifact.
        """
        name = self.engine_model(wanted)
        with ExitStack() as use:
            if wanted.kind == "adapter":
                use.enter_context(files.held(wanted.version_id))
            self._load_and_probe(name, wanted, present, files)
            self._release(name)
            self._uses[name] = use.pop_all()
        for lost in self._uses.keys() - present - {name}:
            self._release(lost)

    def _load_and_probe(self, name: str, wanted: WantedVersion, present: set[str], files: Files) -> None:
        must_differ = False
        if name not in present:
            if wanted.kind != "adapter" or wanted.manifest_sha256 is None:
                raise EngineUnavailable(f"The inference engine at {self.url} serves no model '{name}'.")
            folder = files.verify(wanted.version_id, wanted.manifest_sha256)
            adapter = validate_adapter(
                folder,
                files.base_config(wanted.base_model),
                base_model=wanted.base_model,
                max_rank=files.max_rank,
            )
            must_differ = adapter.is_visible
            self.client.load(name, folder)
            logger.info("loaded %s on %s", name, self.url)
        try:
            answer = self.client.probe(name)
            if must_differ and answer == self._base_answer():
                raise EngineUnavailable(
                    f"The inference engine at {self.url} answers as '{name}' just as its base model does: "
                    "it does not apply the adapter.",
                    code="engine_refused",
                )
        except Exception:
            if wanted.kind == "adapter":
                # The next attempt shall start from verified files again, whatever this one ended with.
                with contextlib.suppress(EngineUnavailable):
                    self.client.unload(name)
            raise

    def unload(self, name: str) -> None:
        """`lock` is held. Raises EngineUnavailable."""
        self.client.unload(name)
        self._release(name)

    def forget(self) -> None:
        """The engine is gone: it reads no files any more."""
        self._base = None
        for name in list(self._uses):
            self._release(name)

    def _release(self, name: str) -> None:
        use = self._uses.pop(name, None)
        if use is not None:
            use.close()

    def _base_answer(self) -> tuple[float, ...]:
        """What the model without an adapter answers to a probe; asked once, since it never changes."""
        if self._base is None:
            self._base = self.client.probe(self.model_name)
        return self._base

    def failed(self, name: str, error: Exception) -> RatchetError:
        """Remember it, and when to try again: 1 s, 2 s, 4 s ... up to a minute. A slot may be free sooner.

        Returns the error as people are told of it; one that nobody foresaw is logged with its traceback, once
        in a row.
        """
        before, problem = self.failures.get(name), _told(error)
        times = before.times + 1 if before is not None and problem.code != NO_SLOT else 1
        delay = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** (times - 1))
        self.failures[name] = Failure(problem, times, time.monotonic() + delay)
        repeated = before is not None and before.error.message == problem.message
        unforeseen = not isinstance(error, (RatchetError, OSError)) and not repeated
        logger.warning(
            "%s on %s: %s; next attempt in %.0f s",
            name,
            self.url,
            problem.message,
            delay,
            exc_info=error if unforeseen else None,
        )
        return problem

    def waiting(self, name: str) -> RatchetError | None:
        """The last error while it is too early to try again."""
        failure = self.failures.get(name)
        return failure.error if failure is not None and failure.retry_at > time.monotonic() else None


def _told(error: Exception) -> RatchetError:
    if isinstance(error, RatchetError):
        return error
    if isinstance(error, OSError):
        return CorruptArtifact(str(error))
    # Not its words, which may hold statements and addresses.
    return EngineUnavailable(
        f"The version could not be brought up ({type(error).__name__}); the API's log has the cause."
    )
