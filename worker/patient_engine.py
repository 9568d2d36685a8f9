"""The inference engine as evaluation needs it: found in the registry, waited for while it restarts.

An engine that dies in the middle must not cost an update hours of training, so a call is repeated until
the engine answers again, on whatever address it comes back. What it refuses is not repeated.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy.orm import Session, sessionmaker

from domain.demonstration import Message
from domain.errors import EngineUnavailable
from domain.measurement import Likelihood
from registry.serving import replicas
from serving.client import EngineClient
from worker.journal import Journal
from worker.lease import Lease

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 900.0
"""A large model takes minutes to load; beyond that somebody must look."""
RETRY_SECONDS = 0.5
Result = TypeVar("Result")


class PatientEngine:
    """Thread-safe. Calls raise EngineUnavailable after PATIENCE_SECONDS without an answer, or at once when
    the engine refuses; and Interrupted when the lease says so."""

    def __init__(
        self,
        reads: sessionmaker[Session],
        base_model: str,
        lease: Lease,
        journal: Journal,
        *,
        scores_prompts: bool,
    ) -> None:
        """`base_model`: what the engine runs, a base model's name or a whole model's id. Without
        `scores_prompts`, asking for a prompt's likelihood could end the engine, and is refused."""
        self.scores_prompts = scores_prompts
        self._reads = reads
        self._base_model = base_model
        self._lease = lease
        self._journal = journal
        self._lock = threading.Lock()
        self._replica: tuple[EngineClient, str] | None = None
        self._clients: list[EngineClient] = []
        self._waiting = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            client.close()

    def call(self, action: Callable[[EngineClient, str], Result]) -> Result:
        """What `action(client, name of the bare base model)` returns."""
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            self._lease.check()
            replica = None
            try:
                replica = self._connected()
                return action(*replica)
            except EngineUnavailable as error:
                if error.code == "engine_refused" or time.monotonic() > give_up_at:
                    raise
                self._forget(replica, error)
            time.sleep(RETRY_SECONDS)

    @contextmanager
    def loaded(self, name: str, adapter: Path) -> Iterator["PatientModel"]:
        """The adapter under a private name for the length of the block."""
        self.call(lambda client, _: client.load(name, adapter))
        try:
            yield PatientModel(self, name, adapter)
        finally:
            self.unload(lambda model: model == name)

    def base(self) -> "PatientModel":
        return PatientModel(self, None, None)

    def unload(self, chosen: Callable[[str], bool]) -> None:
        """Unload the chosen models; an engine that does not answer has nothing to unload by then."""
        try:
            client, _ = self._connected()
            for model in filter(chosen, client.models()):
                client.unload(model)
        except EngineUnavailable as error:
            logger.warning("not unloaded: %s", error)

    def _connected(self) -> tuple[EngineClient, str]:
        with self._lock:
            if self._replica is None:
                self._replica = self._find()
            return self._replica

    def _forget(self, replica: tuple[EngineClient, str] | None, error: EngineUnavailable) -> None:
        """Look again at the next call: the engine may come back on another port."""
        with self._lock:
            if self._replica is not replica:
                return  # another thread noticed first
            self._replica = None
            if self._waiting or error.code == "model_not_loaded":
                return
            self._waiting = True
        self._journal.tell(f"Waiting for the inference engine: {error.message}", level="warning")

    def _find(self) -> tuple[EngineClient, str]:
        with self._reads() as session:
            known = [
                (row.url, row.model_name) for row in replicas(session) if row.base_model == self._base_model
            ]
        for url, model_name in known:
            client = EngineClient(url)
            if client.healthy():
                self._clients.append(client)  # closed at the end only: other threads may still wait on it
                self._waiting = False
                return client, model_name
            client.close()
        at = f" ({', '.join(url for url, _ in known)})" if known else ""
        raise EngineUnavailable(f"No inference engine answers for '{self._base_model}'{at}.")


class PatientModel:
    """One model of the engine, as evaluation asks it."""

    concurrency = 8
    """Requests at a time: fill the engine's batch without starving its other users."""

    def __init__(self, engine: PatientEngine, name: str | None, adapter: Path | None) -> None:
        """Without name and adapter: the bare base model."""
        self._engine = engine
        self._name = name
        self._adapter = adapter

    def chat(self, messages: Sequence[Message], max_tokens: int) -> str:
        return self._ask(lambda client, model: client.chat(model, messages, max_tokens))

    def loglikelihood(self, prefix: str, continuations: Sequence[str]) -> list[Likelihood]:
        if not self._engine.scores_prompts:
            raise EngineUnavailable(
                "The inference engines at RATCHET_ENGINE_URL may not be asked to score prompts, which "
                "evaluation needs: see RATCHET_ENGINE_PROMPT_LOGPROBS in docs/serving.md.",
                code="engine_refused",
            )
        return self._ask(lambda client, model: client.loglikelihood(model, prefix, continuations))

    def _ask(self, action: Callable[[EngineClient, str], Result]) -> Result:
        def attempt(client: EngineClient, base_name: str) -> Result:
            try:
                return action(client, self._name or base_name)
            except EngineUnavailable as error:
                if error.code != "model_not_loaded":
                    raise
                if self._name is None or self._adapter is None:  # it serves another base: no use in waiting
                    raise EngineUnavailable(error.message, code="engine_refused") from error
                client.load(self._name, self._adapter)  # the engine was restarted
                return action(client, self._name)

        return self._engine.call(attempt)
