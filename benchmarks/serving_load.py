"""Serving under load: swaps, the gateway's cost, many versions at once, a killed engine, engines compared.

    ratchet bench serving --json
    python -m benchmarks.serving_load ...      the same

Starts a stack of its own, by `ratchet up` in a temporary home; RATCHET_ENGINE chooses its engine. Versions
are adapters of the real model that say one word each, so that every reply tells which weights wrote it.
Server and clients share the machine. Progress goes to standard error; with --json the last line of standard
output is the report.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import httpx
import psutil

from artifacts import base_models
from artifacts.store import ArtifactStore
from benchmarks import serving_parts as parts
from benchmarks.serving_engines import side_by_side
from benchmarks.serving_versions import TEAM, WORDS, publish, word_adapter
from cli.demo_stack import OwnStack
from cli.errors import CliError
from domain.errors import RatchetError
from domain.settings import Settings
from registry import serving
from registry.session import make_engine, make_sessions

PARTS = ("swaps", "overhead", "together", "death", "engines")


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    report: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)},
        "engine": os.environ.get("RATCHET_ENGINE", "embedded"),
        "engine_threads": Settings().engine_threads,
    }
    chosen = [part for part in PARTS if part in options.parts]
    if chosen != ["engines"]:
        adapters = {}
        for word in WORDS:
            say(f"an adapter that says '{word}'")
            adapters[word] = word_adapter(options.base, word, (options.adapters or scratch) / word)
        with OwnStack(scratch / "home") as stack:
            report |= on_stack(stack, adapters, chosen, options)
    if "engines" in chosen:
        say("engines side by side")
        base = base_models.resolve(options.base, Settings().cache_dir).path
        report["engines"] = side_by_side(
            base, 16, options.tokens, options.rounds, Settings().engine_threads, options.vllm_python
        )
    report["machine"]["load_after"] = round(os.getloadavg()[0], 2)
    return report


def on_stack(
    stack: OwnStack, adapters: dict[str, Path], chosen: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    sessions = make_sessions(make_engine(f"sqlite:///{stack.home / 'ratchet.db'}"))
    store = ArtifactStore(stack.home / "artifacts")
    with httpx.Client(base_url=stack.url, timeout=120, trust_env=False) as client:
        new = {"name": parts.ASSISTANT, "base_model": options.base}
        client.post("/v1/assistants", json=new).raise_for_status()
    (stack.home / "work").mkdir(exist_ok=True)
    words: dict[str, str] = {}
    for number in range(options.versions):
        word = WORDS[number % len(WORDS)]
        words[publish(sessions, store, parts.ASSISTANT, adapters[word], number)] = word
    fresh: dict[str, str] = {}
    for number in range(options.versions, options.versions + -(-options.swaps // 2) * ("swaps" in chosen)):
        word = WORDS[number % len(WORDS)]
        adapter = adapters[word]
        fresh[publish(sessions, store, parts.ASSISTANT, adapter, number, move_champion=False)] = word
    process = psutil.Process(stack.pid)
    first = dict(list(words.items())[: len(WORDS)])
    with sessions() as session:
        engine = serving.replicas(session)[0]
        # Adapters are served under names that only the ledger knows.
        served = serving.wanted_version(session, TEAM, parts.ASSISTANT, 1).served_name
    measured: dict[str, Callable[[], dict[str, Any]]] = {
        "swaps": lambda: parts.swaps(stack.url, first, fresh, options.swaps, options.clients),
        "overhead": lambda: parts.overhead(
            stack.url, engine.url, served, options.clients, options.rounds, options.seconds
        ),
        "together": lambda: parts.together(
            stack.url, words, process, options.clients, options.rounds, options.seconds
        ),
        "death": lambda: parts.death(stack.url, first, process, options.clients),
    }
    found = {}
    for part in chosen:
        if part in measured:
            with httpx.Client(base_url=stack.url, timeout=120, trust_env=False) as client:
                parts.move(client, "v1", back=False)
            say(part)
            began = time.monotonic()
            found[part] = measured[part]()
            say(f"{part}, {time.monotonic() - began:.0f} s: {json.dumps(found[part])}")
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(report: dict[str, Any]) -> None:
    """For people: every figure, part by part."""
    for part, found in report.items():
        print(part)
        for name, value in found.items() if isinstance(found, dict) else [("", found)]:
            print(f"  {name:28} {value}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ratchet bench serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="end with the report on one line")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="built-in name, hub id or folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--adapters", type=Path, help="folder that keeps the taught adapters for the next run"
    )
    parser.add_argument("--swaps", type=int, default=100, help="moves of the champion")
    parser.add_argument("--clients", type=int, default=16, help="streaming at the same time")
    parser.add_argument("--versions", type=int, default=32, help="served together")
    parser.add_argument("--rounds", type=int, default=5, help="of what is measured in turn")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer where engines are compared")
    parser.add_argument(
        "--vllm-python", type=Path, help="interpreter that has vLLM, to compare it with the other engines"
    )
    options = parser.parse_args()
    if options.versions < len(WORDS):
        parser.error(f"--versions must be {len(WORDS)} or more")
    return options


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="rbs-") as scratch:
        try:
            report = measure(options, Path(scratch))
        except (CalledProcessError, CliError, RatchetError, httpx.HTTPError, RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if options.json:
        print(json.dumps(report))
    else:
        show(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
