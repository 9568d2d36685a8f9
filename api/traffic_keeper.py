"""Keeps the traffic plans in memory and the ledger in step: a task of the API process.

Judging never waits for the database, so a bad canary stops here at once even when the ledger is away; it is
told as soon as it answers. Several API processes may run one each: a rollback is compare-and-set.
"""

import asyncio
import logging
import threading

from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from api.traffic import TrafficControl, Verdict
from registry import traffic, traffic_figures
from registry.traffic_figures import Figures

logger = logging.getLogger(__name__)

JUDGE_SECONDS = 0.5
LEDGER_SECONDS = 1.0


class TrafficKeeper:
    def __init__(
        self, control: TrafficControl, sessions: sessionmaker[Session], reads: sessionmaker[Session]
    ) -> None:
        self._control = control
        self._sessions = sessions
        self._reads = reads
        self._reading = threading.Lock()

    def refresh(self) -> None:
        """Take over what the ledger says. One reader at a time, or an older answer could win."""
        with self._reading, self._reads() as session:
            found = traffic.plans(session)
            self._control.plans = {(plan.team_id, plan.assistant_name): plan for plan in found}

    async def run(self) -> None:
        """Until cancelled. A canary that nobody judges gets nothing."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._judge())
                tasks.create_task(self._keep())
        finally:
            self._control.plans = {}

    async def flush(self) -> None:
        """Write the figures down."""
        taken = self._control.take_figures()
        if not taken:
            return
        try:
            await run_in_threadpool(self._write, taken)
        except SQLAlchemyError:
            self._control.give_back(taken)
            raise

    async def _judge(self) -> None:
        while True:
            self._control.judge_all()
            await asyncio.sleep(JUDGE_SECONDS)

    async def _keep(self) -> None:
        away = False
        while True:
            try:
                await run_in_threadpool(self.refresh)
                await self._settle()
                await self.flush()
                away = False
            except SQLAlchemyError as error:
                if not away:
                    logger.warning("traffic is kept in memory until the ledger answers: %s", error)
                away = True
            await asyncio.sleep(LEDGER_SECONDS)

    async def _settle(self) -> None:
        """Tell the ledger of the canaries that were stopped."""
        for verdict in self._control.unsettled():
            if await run_in_threadpool(self._roll_back, verdict):
                logger.warning("%s: %s", verdict.plan.assistant_name, verdict.rollback.reason)
            await run_in_threadpool(self.refresh)
            self._control.settled(verdict)

    def _roll_back(self, verdict: Verdict) -> bool:
        with self._sessions.begin() as session:
            return traffic.roll_back_canary(session, verdict.plan, verdict.rollback)

    def _write(self, figures: list[Figures]) -> None:
        with self._sessions.begin() as session:
            traffic_figures.add_figures(session, figures)
