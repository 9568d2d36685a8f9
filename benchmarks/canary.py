"""How often a canary is taken back, by simulation: `python -m benchmarks.canary [--runs N] [--json]`.

Each run is ten windows of 1,000 requests, a tenth of them the canary's, judged after each of its failures and
every twentieth request: as the gateway does. Latencies are log-normal (median 0.135 s, sigma 0.8).
"""

import argparse
import json
import random
import statistics
from dataclasses import dataclass

from domain.traffic import Canary
from serving.canary import Window, judge

WINDOWS, REQUESTS, SHARE = 10, 1000, 0.1
LIMITS = Canary(percent=100 * SHARE)


@dataclass(frozen=True)
class Case:
    name: str
    canary_errors: float
    champion_errors: float
    latency_ratio: float
    worse: bool
    """Whether the canary ought to go."""


CASES = (
    Case("both fail 1%", 0.01, 0.01, 1.0, False),
    Case("both fail 5%, the limit", 0.05, 0.05, 1.0, False),
    Case("both fail 20%", 0.2, 0.2, 1.0, False),
    Case("twice as slow, the limit", 0.0, 0.0, 2.0, False),
    Case("12% against 1%", 0.12, 0.01, 1.0, True),
    Case("20% against 1%", 0.2, 0.01, 1.0, True),
    Case("all against none", 1.0, 0.0, 1.0, True),
    Case("three times as slow", 0.0, 0.0, 3.0, True),
)


def run(case: Case, dice: random.Random) -> int | None:
    """The canary's requests until it was taken back; None: it never was."""
    canary, champion, asked = Window(), Window(), 0
    for number in range(WINDOWS * REQUESTS):
        now = number * LIMITS.window_seconds / REQUESTS
        to_canary = dice.random() < SHARE
        asked += to_canary
        failed = dice.random() < (case.canary_errors if to_canary else case.champion_errors)
        seconds = dice.lognormvariate(-2.0, 0.8) * (case.latency_ratio if to_canary else 1.0)
        (canary if to_canary else champion).add(now, None if failed else seconds)
        if (to_canary and failed) or number % 20 == 0:
            seen = [side.seen(now, LIMITS.window_seconds) for side in (canary, champion)]
            if judge(LIMITS, *seen) is not None:
                return asked
    return None


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--json", action="store_true")
    asked = arguments.parse_args()
    dice, found = random.Random(asked.seed), []
    for case in CASES:
        until = [count for _ in range(asked.runs) if (count := run(case, dice)) is not None]
        median = statistics.median(until) if until else None
        line = f"{case.name}: {len(until)} of {asked.runs} taken back, after {median} requests"
        found.append(
            {"case": case.name, "worse": case.worse, "runs": asked.runs, "back": len(until), "after": median}
        )
        if not asked.json:
            print(line, flush=True)
    if asked.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
