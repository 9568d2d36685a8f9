"""Contenders take turns, one step each: a machine that slows down slows all of them alike.

A contender is a process of its own. It says `loaded` and `ready`, then takes a step for each line on its
standard input and says `step`. Nothing here imports torch: the parent only keeps the turns.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]


class Turns:
    """A contender's side. Its standard output is taken for the protocol; what libraries print goes to
    standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, what: str, **values: Any) -> None:
        print(json.dumps({"what": what, **values}), file=self._out, flush=True)

    def wait(self) -> None:
        """Until it is this contender's turn; ends the process when there will be none."""
        if not sys.stdin.readline():
            sys.stdout.flush()
            os._exit(0)


@dataclass(frozen=True)
class Step:
    seconds: float
    cpu_seconds: float
    """Of all threads: what the step takes whatever else the machine does."""
    rollout_seconds: float
    teacher_seconds: float
    student_seconds: float
    response_tokens: float
    """Mean length of the step's samples."""
    loss: float | None


class Unmeasurable(Exception):
    """The message says what is missing."""


class ContenderFailed(Exception):
    """The process ended before its last turn."""


@dataclass
class Contender:
    """The parent's side: a process, its weights in memory, and the steps that it took."""

    name: str
    arguments: list[str]
    threads: int
    python: str = sys.executable
    dtype: str = ""
    weights_rss: int = 0
    peak_rss: int = 0
    steps: list[Step] = field(default_factory=list)
    _process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Start it and wait until it is ready for its first step."""
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # whoever waits for its turn must not spin
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        self._process = subprocess.Popen(
            [self.python, "-m", *self.arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        loaded = self._hear("loaded")
        self.weights_rss, self.dtype = loaded["rss"], loaded["dtype"]
        self._hear("ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        if kind is not None:
            self._process.kill()
        self._process.wait()

    def step(self) -> Step:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContenderFailed(f"{self.name} ended before its step; its messages are above") from None
        heard = self._hear("step")
        self.peak_rss = heard.pop("peak_rss")
        self.steps.append(Step(**heard))
        return self.steps[-1]

    @property
    def peak_above_weights(self) -> int:
        """Bytes."""
        return self.peak_rss - self.weights_rss

    def _hear(self, what: str) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise ContenderFailed(
                f"{self.name} ended with status {status} before '{what}'; its messages are above"
            )
        heard: dict[str, Any] = json.loads(line)
        if heard.pop("what") != what:
            raise ContenderFailed(f"{self.name} said {line.strip()!r} in place of '{what}'")
        return heard


def take_turns(contenders: list[Contender], rounds: int) -> None:
    """Each contender's step in turn, `rounds` times, the order reversed every round."""
    for number in range(rounds):
        order = contenders if number % 2 == 0 else contenders[::-1]
        for contender in order:
            step = contender.step()
            print(f"  {contender.name}: step {len(contender.steps)}, {step.seconds:.2f} s", file=sys.stderr)


def paired_ratios(over: list[Step], under: list[Step]) -> list[float]:
    """Seconds of the one over seconds of the other, round by round."""
    return [round(one.seconds / other.seconds, 3) for one, other in zip(over, under, strict=True)]


def cpu_ratio(over: list[Step], under: list[Step]) -> float:
    """CPU seconds of the one over those of the other, all steps together."""
    return round(sum(one.cpu_seconds for one in over) / sum(other.cpu_seconds for other in under), 3)
