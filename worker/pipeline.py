"""The story of one update, top to bottom.

claim -> train -> evaluate -> gate -> publish files and row -> serve -> finish. Each stage can run again
after its process died: training goes on from its newest checkpoint, a finished candidate is not trained
twice, a published version is not published twice. No transaction is open while anything slow runs, and
every write carries the claim, so that a worker which lost its lease changes nothing.
"""

import logging
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from artifacts import base_models
from artifacts.opening import open_store
from domain.errors import RatchetError, StaleFence, UpdateCancelled
from domain.failpoint import failpoint
from domain.measurement import Verdict
from domain.settings import Settings
from domain.training import TrainingJob
from domain.update import FINISHED, Phase, Status
from domain.version import CHAMPION
from evaluation.gate import decide
from registry import aliases, assistants, serving, updates, versions
from registry.claims import Claim, Patience
from registry.session import make_engine, make_reading_sessions, make_sessions
from serving.checkpoint_validation import validate_checkpoint
from worker import shutdown
from worker.brief import Brief, read_brief
from worker.evaluating import Evaluation, Scores, check_candidate
from worker.evaluation_engines import Engines
from worker.job import build_job, check_merged_rank, prepare_job
from worker.journal import Journal
from worker.lease import Interrupted, Lease, Stop
from worker.leftovers import remove_files, remove_leftovers, remove_unfinished
from worker.setbacks import Failure, understand
from worker.training import train

logger = logging.getLogger(__name__)

SERVING_PATIENCE_SECONDS = 60.0
ENGINE_START_PATIENCE_SECONDS = 600.0
"""A full version has to start an engine first."""
SERVING_POLL_SECONDS = 0.25


class Pipeline:
    """What every update needs; `run` works one update to its end, or gives it back."""

    def __init__(
        self,
        settings: Settings,
        sessions: sessionmaker[Session],
        reads: sessionmaker[Session],
        *,
        trainer_command: list[str],
        shutdown_requested: Callable[[], bool],
    ) -> None:
        self.settings = settings
        self.sessions = sessions
        self.reads = reads
        self.store = open_store(settings)
        self.trainer_command = trainer_command
        self.patience = Patience(tries=settings.update_tries, first_seconds=settings.retry_seconds)
        self._shutdown_requested = shutdown_requested
        # Never the same again, so that a restarted worker cannot be taken for its predecessor.
        self._name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"

    @classmethod
    def from_settings(cls, trainer_command: list[str] | None = None) -> Self:
        """For the process that runs one task; its SIGTERM then means: give the update back."""
        settings = Settings()
        shutdown.heed_sigterm()
        ledger = make_engine(settings.resolved_database_url)
        return cls(
            settings,
            make_sessions(ledger),
            make_reading_sessions(ledger),
            trainer_command=trainer_command or [sys.executable, "-m", "trainer"],
            shutdown_requested=shutdown.requested,
        )

    def run(self, update_id: str) -> None:
        """Does nothing when the update is finished, paused, or another worker's."""
        lease_seconds = self.settings.lease_seconds
        with self.sessions.begin() as session:
            remove_leftovers(session, self.settings.work_dir)
            claim = updates.claim(
                session,
                update_id,
                worker=self._name,
                lease_seconds=lease_seconds,
                patience=self.patience,
            )
        failpoint("worker.claimed")
        if claim is None:
            logger.info("%s is not to be had", update_id)
            return
        logger.info("claimed %s with fence %d", update_id, claim.fence)
        lease = Lease(
            self.sessions,
            claim,
            lease_seconds=lease_seconds,
            heartbeat_seconds=self.settings.heartbeat_seconds,
            shutdown_requested=self._shutdown_requested,
        )
        try:
            with lease, ExitStack() as uses:
                Story(self, claim, lease, uses).tell()
        except StaleFence:
            logger.warning("%s is another worker's now", update_id)


@dataclass(frozen=True)
class Start:
    """What the trainer starts from."""

    base: Path
    """A whole model: what the trainer calls the base."""
    parent: Path | None
    """An adapter on it, or with full training another whole model; None: the base."""


class Story:
    """One claim's work on one update."""

    def __init__(self, pipeline: Pipeline, claim: Claim, lease: Lease, uses: ExitStack) -> None:
        """`uses`: what must stay until the work is over."""
        self._pipeline = pipeline
        self._settings = pipeline.settings
        self._sessions = pipeline.sessions
        self._reads = pipeline.reads
        self._claim = claim
        self._lease = lease
        self._uses = uses
        self._journal = Journal(pipeline.sessions, claim, lease.stop)
        self._folder = pipeline.settings.work_dir / claim.update_id

    def tell(self) -> None:
        """Run the stages and record how it ended. StaleFence and database errors are the caller's: the
        update is another worker's then, now or when the lease runs out."""
        try:
            self._lease.check()
            with self._reads() as session:
                brief = read_brief(session, self._claim)
            version_id = brief.published
            if version_id is None:
                candidate = self._train(brief)
                scores = self._evaluate(brief, candidate)
                verdict = self._gate(brief, scores)
                version_id = self._publish(brief, candidate, scores, verdict)
            self._serve(brief, version_id)
            self._finish(Status.SUCCEEDED)
        except Interrupted as interrupted:
            self._give_way(interrupted.stop)
        except UpdateCancelled:  # by the ledger, before a heartbeat told
            self._give_way(Stop.CANCEL)
        except (StaleFence, SQLAlchemyError):
            raise
        except Exception as error:
            failure = understand(error)
            logger.warning("%s failed: %s", self._claim.update_id, failure.code, exc_info=error)
            if failure.may_pass:
                self._retry_later(failure)
            else:  # a defect of ours too: it would meet every further claim again
                self._finish(Status.FAILED, failure)

    def _train(self, brief: Brief) -> Path:
        """The candidate's folder, whole."""
        candidate = self._folder / "candidate"
        if candidate.is_dir():
            return candidate
        self._journal.enter(Phase.PREFLIGHT)
        self._folder.mkdir(parents=True, exist_ok=True)
        output = self._folder / f"output-{self._claim.fence}"

        def build() -> TrainingJob:
            with self._reads() as session:
                return build_job(session, brief)

        start = self._start(brief)
        check_merged_rank(brief.recipe, start.parent, self._settings.adapter_rank_limit)
        job_file = prepare_job(
            self._folder,
            build,
            base=start.base,
            parent_adapter=start.parent,
            output=output,
            rollout_url=self._settings.rollout_url,
        )
        failpoint("worker.job_written")
        train(
            self._pipeline.trainer_command,
            job_file,
            output,
            threads=self._settings.trainer_threads,
            silence_seconds=self._settings.trainer_silence_seconds,
            lease=self._lease,
            journal=self._journal,
        )
        failpoint("worker.trained")
        output.rename(candidate)
        failpoint("worker.candidate_placed")
        return candidate

    def _evaluate(self, brief: Brief, candidate: Path) -> Scores:
        self._journal.enter(Phase.EVALUATING)
        if brief.recipe.version_kind == "full":
            validate_checkpoint(candidate, self._base(brief))
        else:
            limit = self._settings.adapter_rank_limit
            check_candidate(candidate, self._base(brief), brief.base_model, limit)
        evaluation = Evaluation(
            self._reads, self._claim, brief, self._settings, self._journal, self._base(brief)
        )
        engines = Engines(
            self._sessions, self._reads, self._claim, brief, self._lease, self._journal, self._settings
        )
        return evaluation.run(engines, candidate, self._parent_adapter(brief))

    def _gate(self, brief: Brief, scores: Scores) -> Verdict:
        self._journal.enter(Phase.GATING)
        failpoint("worker.gating")
        return decide(brief.gate, brief.skills, scores.candidate, scores.parent, scores.earlier)

    def _publish(self, brief: Brief, candidate: Path, scores: Scores, verdict: Verdict) -> str:
        """Files first, then the row that makes them count; returns the version's id."""
        self._journal.enter(Phase.PUBLISHING)
        with self._sessions.begin() as session:
            version_id, _ = versions.allocate_version(session, self._claim)
        self._lease.check()
        failpoint("worker.allocated")
        staging = self._folder / f"staging-{self._claim.fence}"
        shutil.rmtree(staging, ignore_errors=True)
        # The candidate itself stays until the update ends: a later claim publishes it under another id.
        shutil.copytree(candidate, staging, copy_function=os.link)
        failpoint("worker.staged")
        manifest, sha256 = self._pipeline.store.publish(
            staging,
            version_id=version_id,
            kind=brief.recipe.version_kind,
            base_model=brief.base_model,
            update_id=brief.update_id,
            checkpoint=brief.checkpoint if brief.recipe.version_kind == "adapter" else None,
        )
        failpoint("worker.files_published")
        try:
            with self._sessions.begin() as session:
                _, number = versions.allocate_version(session, self._claim)
                version = versions.publish(
                    session,
                    self._claim,
                    version_id=version_id,
                    number=number,
                    served_name=f"{brief.assistant}-v{number}-{sha256[:8]}",
                    manifest=manifest,
                    manifest_sha256=sha256,
                    recipe=brief.recipe,
                    verdict=verdict,
                    measurements=scores.candidate,
                    move_champion=verdict.outcome == "pass" and brief.publish == "auto",
                )
                failpoint("worker.row_written")
        except RatchetError:  # refused: no row will ever name these files, and no other claim this id
            self._pipeline.store.delete(version_id)
            raise
        failpoint("worker.row_committed")
        return version.id

    def _serve(self, brief: Brief, version_id: str) -> None:
        """Wait until the version answers for the champion; a version that is not champion is not awaited."""
        began = time.monotonic()
        full = brief.recipe.version_kind == "full"
        patience = ENGINE_START_PATIENCE_SECONDS if full else SERVING_PATIENCE_SECONDS
        while True:
            with self._reads() as session:
                assistant = assistants.get_assistant(session, brief.team_id, brief.assistant_id)
                champion = aliases.get_alias(session, assistant, CHAMPION)
                state = serving.serving_state(session, brief.assistant_id, CHAMPION)
            if champion.version_id != version_id:
                return
            self._journal.enter(Phase.SERVING)
            if state is not None and state.version_id == version_id:
                # Both by the database's clock.
                seconds = round(state.updated_at - champion.updated_at, 3)
                self._journal.tell(
                    f"Serving after {seconds:.1f} s.", data={"served": version_id, "swap_seconds": seconds}
                )
                return
            if time.monotonic() - began > patience:
                reason = (state.error if state is not None else None) or "no inference engine reported it"
                self._journal.tell(
                    f"Published, but not serving after {patience:.0f} s: {reason}",
                    level="warning",
                    data={"version": version_id},
                )
                return
            stop = self._lease.stop()
            if stop in (Stop.LOST, Stop.SHUTDOWN):  # too late for the other reasons
                raise Interrupted(stop)
            time.sleep(SERVING_POLL_SECONDS)

    def _finish(self, status: Status, failure: Failure | None = None) -> None:
        """End the update and remove its work files; a failed one's log stays."""
        error = None if failure is None else failure.as_error()
        if status == Status.SUCCEEDED:
            seconds = self._journal.stage_seconds()
            told = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in seconds.items())
            self._journal.tell(f"Done: {told}.", data={"stage_seconds": seconds})
        with self._sessions.begin() as session:
            updates.finish(session, self._claim, status, error=error)
            # Before the commit: until then no successor can be using these files.
            remove_files(self._folder, keep_log=status == Status.FAILED)
            failpoint("worker.finishing")
        failpoint("worker.finished")

    def _retry_later(self, failure: Failure) -> None:
        # First of all room, which may be what was missing, also for the ledger itself.
        remove_unfinished(self._folder)
        with self._sessions.begin() as session:
            row = updates.retry_later(session, self._claim, failure.as_error(), self._pipeline.patience)
            if Status(row.status) in FINISHED:
                remove_files(self._folder, keep_log=row.status == Status.FAILED)
            failpoint("worker.releasing")

    def _give_way(self, stop: Stop) -> None:
        if stop == Stop.CANCEL:
            self._finish(Status.CANCELLED)
        elif stop in (Stop.SHUTDOWN, Stop.PAUSE):
            with self._sessions.begin() as session:
                updates.release(session, self._claim)
                failpoint("worker.releasing")
            failpoint("worker.released")
        else:
            logger.warning("lost the lease on %s", self._claim.update_id)

    def _base(self, brief: Brief) -> Path:
        return base_models.resolve(brief.base_model, self._settings.cache_dir).path

    def _start(self, brief: Brief) -> Start:
        """An adapter trains on the whole model that its parent is or lies on, which then is its base; a full
        version from a full one keeps the assistant's own. Raises CorruptArtifact."""
        if brief.checkpoint is None:
            return Start(self._base(brief), self._parent_adapter(brief))
        checkpoint = self._verified(brief.checkpoint.version_id, brief.checkpoint.manifest_sha256)
        if brief.parent_kind == "full" and brief.recipe.version_kind == "full":
            return Start(self._base(brief), checkpoint)
        return Start(checkpoint, self._parent_adapter(brief))

    def _parent_adapter(self, brief: Brief) -> Path | None:
        """None when the parent is a whole model. Raises CorruptArtifact."""
        if brief.parent_kind != "adapter" or brief.parent_manifest_sha256 is None:
            return None
        return self._verified(brief.parent_id, brief.parent_manifest_sha256)

    def _verified(self, version_id: str, manifest_sha256: str) -> Path:
        """With the parent, which retention keeps for as long as the update is not finished."""
        store = self._pipeline.store
        self._uses.enter_context(store.held(version_id))
        return store.verify(version_id, manifest_sha256)
