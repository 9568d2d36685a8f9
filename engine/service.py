"""The process: load, warm up, listen, stop."""

import asyncio
import logging
import math
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
import uvicorn

from engine.errors import EngineError
from engine.model import BaseModel, DtypeName
from engine.requests import Engine
from engine.sampling import SamplingParams
from engine.scheduler import Limits, Scheduler
from engine.sequence import Failure, Output, Sequence
from engine.server import create_app
from engine.text import RunningText

logger = logging.getLogger("engine")

STOP_SECONDS = 1.0
"""For open requests to be told, and again for the compute thread to end its step."""
CPU_CACHE_BYTES = 2 * 1024**3
CUDA_CACHE_SHARE = 0.5
"""Of the device memory that is free once the model is loaded; it is taken only as needed."""
WARM_UP_SECONDS = 600


def run(
    *,
    model: str,
    name: str,
    listening: socket.socket,
    max_model_len: int | None,
    dtype: DtypeName,
    threads: int,
) -> int:
    """Serve until SIGTERM or SIGINT, then leave the process; returns a status when it cannot begin."""
    torch.set_num_threads(threads)
    started = time.monotonic()
    try:
        base = BaseModel(Path(model), dtype=dtype, max_model_len=max_model_len)
        server = _Server(name, base)
        server.warm_up()
    except (OSError, ValueError, EngineError) as error:
        logger.error("cannot serve %s: %s", model, error)
        return os.EX_DATAERR
    details = {
        "model": name,
        "port": listening.getsockname()[1],
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": base.device.type,
        "threads": threads,
        "max_model_len": base.max_length,
        "start_seconds": round(time.monotonic() - started, 1),
    }
    server.serve_until_stopped(listening, details)


def _limits(model: BaseModel) -> Limits:
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        budget, sequences, step_tokens = int(free * CUDA_CACHE_SHARE), 256, 2048
    else:
        budget, sequences, step_tokens = CPU_CACHE_BYTES, 64, 512
    # One sequence of full length must fit whatever the budget says.
    tokens = max(budget // model.cache_shape.bytes_per_token, model.max_length)
    return Limits(sequences=sequences, step_tokens=step_tokens, cache_tokens=tokens)


class _Server:
    """HTTP and compute thread together."""

    def __init__(self, name: str, model: BaseModel) -> None:
        self._model = model
        self._limits = _limits(model)
        self._failed = False
        self._scheduler = Scheduler(model, self._limits, self._on_failure)
        app = create_app(Engine(name, model, self._scheduler))
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            # Longer than any client keeps an idle connection: it must not be closed under a new request.
            timeout_keep_alive=600,
            timeout_graceful_shutdown=int(STOP_SECONDS),
        )
        self._http = _Http(config, self._scheduler)

    def warm_up(self) -> None:
        """Run a full step and two decoding steps, so that the first request finds everything ready.

        Raises EngineError or ValueError when the model cannot compute, TimeoutError when it does not end.
        """
        self._scheduler.start()
        length = min(self._limits.step_tokens, self._model.max_length - 3)
        done = threading.Event()
        news: list[Output | Failure] = []

        def listener(one: Output | Failure) -> None:
            news.append(one)
            done.set()

        prompt = [0] * length
        params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=1, score_prompt=True)
        sequence = Sequence(
            index=0,
            prompt=prompt,
            params=params,
            adapter=None,
            text=RunningText(self._model.tokenizer, prompt, ()),
            listener=listener,
            stream=False,
            generator=None,
        )
        self._scheduler.submit([sequence])
        if not done.wait(WARM_UP_SECONDS):
            raise TimeoutError(f"the first request took more than {WARM_UP_SECONDS} s")
        if isinstance(news[0], Failure):
            raise news[0].error
        scores = [*sequence.prompt_logprobs[1:], *sequence.output_logprobs]
        if not all(score is not None and math.isfinite(score.logprob) for score in scores):
            raise ValueError("the model computes values that are not finite")

    def serve_until_stopped(self, listening: socket.socket, details: dict[str, object]) -> NoReturn:
        """Log `ready` with `details` once requests are taken."""
        self._http.details = details
        # Only from here on: while the model loads, a signal ends the process at once. uvicorn has handlers of
        # its own, but only while its loop runs, and raises the signal again once it has stopped; ending by
        # it would hide the exit status.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._http.run(sockets=[listening])
        self._scheduler.stop(STOP_SECONDS)
        logger.info("stopped", extra={"failed": self._failed})
        logging.shutdown()
        # Nothing is left to save; taking torch down would add a second, or a crash inside a step.
        os._exit(os.EX_SOFTWARE if self._failed else os.EX_OK)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._http.should_exit = True

    def _on_failure(self) -> None:
        self._failed = True
        self._http.should_exit = True


class _Http(uvicorn.Server):
    """uvicorn, which fails open requests at once when it is told to stop, instead of waiting for them."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self._scheduler = scheduler
        self._running_loop: asyncio.AbstractEventLoop | None = None
        self.details: dict[str, object] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        logger.info("ready", extra=self.details)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._running_loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._running_loop is not None:
            self._running_loop.call_soon_threadsafe(self._scheduler.begin_stop)
