import importlib.metadata
import json
import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli import doctor
from cli.errors import CliError
from cli.home import HomeLock, socket_path
from cli.main import app
from cli.up import bind
from domain.settings import Settings


def test_an_old_python_is_a_problem_with_a_remedy() -> None:
    finding = doctor.check_python((3, 10, 4))
    assert (finding.state, finding.message) == ("problem", "Python 3.10.4")
    assert "3.11" in (finding.mend or "")
    assert doctor.check_python((3, 12, 0)).state == "ok"


def test_missing_packages_are_named() -> None:
    def version(name: str) -> str:
        if name in ("torch", "celery"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    [finding] = doctor.check_packages(("httpx", "torch", "celery"), version)
    assert (finding.state, finding.message) == ("problem", "not installed: torch, celery")


def test_a_path_below_a_file_is_no_home(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert doctor.check_home(tmp_path / "file" / "home").state == "problem"
    assert doctor.check_home(tmp_path / "new" / "home").state == "ok"


def test_memory_is_read_from_meminfo() -> None:
    low = "MemTotal:       8000000 kB\nMemAvailable:    1000000 kB\n"
    needed = 3_000_000_000
    assert doctor.check_memory(low, needed).state == "problem"
    assert "1.0 GB available" in doctor.check_memory(low, needed).message
    assert doctor.check_memory(low.replace("1000000", "5000000"), needed).state == "ok"
    assert doctor.check_memory(low.replace("1000000", "5000000"), 2 * needed).state == "problem"
    assert doctor.check_memory(None, needed).state == "note"


def test_bfloat16_is_read_from_cpuinfo() -> None:
    assert doctor.check_cpu("flags\t\t: fpu amx_bf16 avx512_bf16", "x86_64").state == "ok"
    assert doctor.check_cpu("flags\t\t: fpu avx2", "x86_64").state == "note"


def test_socket_path_limit_is_exact(tmp_path: Path) -> None:
    longest = Path("/" + "h" * (107 - len("/valkey.sock") - 1))
    assert len(str(socket_path(longest))) == 107
    with pytest.raises(CliError, match=r"108 bytes long.*at most 107.*--home"):
        socket_path(Path(f"{longest}h"))
    with socket.socket(socket.AF_UNIX) as one, pytest.raises(OSError, match="AF_UNIX path too long"):
        one.bind(str(tmp_path / ("x" * 108)))


def test_base_model_absent_and_unreachable_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "reachable", lambda url: False)
    finding = doctor.check_base_model(Settings(cache_dir=tmp_path))
    assert finding.state == "problem"
    assert str(tmp_path) in (finding.mend or "")
    monkeypatch.setattr(doctor, "reachable", lambda url: "huggingface" not in url)
    assert doctor.check_base_model(Settings(cache_dir=tmp_path)).state == "note"


def test_a_torn_base_model_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "base" / "smollm2-135m-instruct").mkdir(parents=True)
    finding = doctor.check_base_model(Settings(cache_dir=tmp_path))
    assert (finding.state, "remove" in (finding.mend or "")) == ("problem", True)


def test_a_taken_port_is_a_problem(tmp_path: Path) -> None:
    with bind(0) as listener:
        port = listener.getsockname()[1]
        listener.listen()
        finding = doctor.check_stack(tmp_path / "home", "http://127.0.0.1:9", port)
        assert (finding.check, finding.state) == ("port", "problem")
        with pytest.raises(CliError, match=f"port {port} on 127.0.0.1 cannot be used"):
            bind(port)


def test_the_command_prints_json_and_exits_1_on_a_problem(tmp_path: Path) -> None:
    home = tmp_path / ("h" * 120)
    result = CliRunner().invoke(app, ["doctor", "--home", str(home), "--json"])
    findings = {finding["check"]: finding for finding in json.loads(result.stdout)}
    assert findings["broker"]["state"] == "problem"
    assert findings["python"]["state"] == "ok"
    assert result.exit_code == 1


def test_one_home_has_one_holder(tmp_path: Path) -> None:
    with HomeLock(tmp_path) as lock:
        lock.describe("`ratchet up` at http://127.0.0.1:1234")
        with pytest.raises(CliError, match=r"in use by `ratchet up` at http://127\.0\.0\.1:1234"):
            HomeLock(tmp_path).__enter__()
    with HomeLock(tmp_path):
        pass


def test_the_engine_that_would_start_is_checked(tmp_path: Path) -> None:
    assert doctor.check_engine(Settings(home=tmp_path)).state == "ok"
    missing = doctor.check_engine(Settings(home=tmp_path, engine="vllm", vllm_python=tmp_path / "python"))
    assert (missing.state, "make vllm" in (missing.mend or "")) == ("problem", True)
    without = doctor.check_engine(Settings(home=tmp_path, engine="vllm", vllm_python=Path(sys.executable)))
    assert (without.state, "has no vLLM" in without.message) == ("problem", True)


def test_servers_that_the_settings_name_must_answer(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        finding = doctor.check_engine(Settings(home=tmp_path, engine_url=f"{url}/, {url}"))
    assert (finding.state, finding.message) == ("problem", f"no answer from {url}")
