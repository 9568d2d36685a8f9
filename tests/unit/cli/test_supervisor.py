"""The supervisor on real, small processes."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli import launch
from cli.supervisor import Component, StopRequest, Supervisor, spawn

ROOT = Path(__file__).parents[3]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone, or gone since the file was opened
        return False
    return state != "Z"


def python(name: str, code: str, **options: object) -> Component:
    command = [sys.executable, "-u", "-c", textwrap.dedent(code)]
    return Component(name, lambda: command, dict(os.environ), **options)  # type: ignore[arg-type]


def never() -> bool:
    return False


class Clock:
    """In place of the supervisor's: time goes by only as it sleeps, and only while `runs` says so."""

    def __init__(self, runs: Callable[[], bool]) -> None:
        self.now = 0.0
        self._runs = runs

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        if self._runs():
            self.now += seconds


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path / "logs")
    yield made
    made.stop(lambda: True)


def test_kill_9_of_the_parent_takes_children_and_their_groups(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    parent = tmp_path / "parent.py"
    parent.write_text(
        textwrap.dedent(f"""
        import os, sys, time
        from pathlib import Path
        from cli.supervisor import Component, Supervisor
        code = "import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\\\n'); time.sleep(600)"
        supervisor = Supervisor(Path({str(tmp_path)!r}))
        for name in ("one", "two"):
            supervisor.add(Component(name, lambda: [sys.executable, "-c", code], dict(os.environ)))
        time.sleep(600)
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(parent)], env=environment) as process:
        until(lambda: pids.exists() and pids.read_text().count("\n") == 2)
        children = [int(line) for line in pids.read_text().split()]
        assert all(is_running(child) for child in children)
        process.kill()
        process.wait()
        until(lambda: not any(is_running(child) for child in children))


def test_a_child_whose_parent_is_gone_already_does_not_start(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    someone_else = "1"
    done = subprocess.run(
        [sys.executable, "-I", "-S", launch.__file__, someone_else, "9", "touch", str(touched)], check=False
    )
    assert done.returncode == 137
    assert not touched.exists()


def test_children_lead_their_own_session() -> None:
    process = spawn(["sleep", "600"])
    try:
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
    finally:
        process.kill()
        process.wait()


def test_spawning_off_the_main_thread_is_refused() -> None:
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            spawn(["true"])
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


def test_logs_carry_the_component_and_are_kept(
    supervisor: Supervisor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = supervisor.add(
        python(
            "talker",
            "import sys; print('to out'); print('to err', file=sys.stderr); import time; time.sleep(60)",
        )
    )
    shown: list[str] = []

    def are_shown() -> bool:
        shown.append(capsys.readouterr().err)
        return "to err\n" in "".join(shown)

    until(are_shown)
    assert "".join(shown) == "talker     | to out\ntalker     | to err\n"
    assert (tmp_path / "logs" / "talker.log").read_text() == "to out\nto err\n"
    assert list(child.tail) == ["to out", "to err"]


def test_ready_mark_is_seen_only_once_logged(supervisor: Supervisor, tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    late = f"""
        import os, time
        print("begin")
        while not os.path.exists({str(go_on)!r}):
            time.sleep(0.01)
        print("all ready.")
        time.sleep(60)
        """
    child = supervisor.add(python("late", late, ready_mark=" ready."))
    until(lambda: "begin" in child.tail)
    assert not child.marked
    go_on.touch()
    until(lambda: child.marked)


def test_who_hears_of_a_childs_end_knows_its_last_words(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.supervisor.say", lambda *_: time.sleep(0.3))  # a slow reader of its log
    monkeypatch.setattr("cli.supervisor.LAST_WORDS_SECONDS", 60.0)
    child = supervisor.add(python("wordy", "print('one'); print('two'); raise SystemExit('the reason')"))
    until(lambda: supervisor.poll() == [child])
    assert list(child.tail) == ["one", "two", "the reason"]


def test_a_crashed_child_is_started_again_later_each_time(supervisor: Supervisor) -> None:
    child = supervisor.add(python("crasher", "raise SystemExit(3)"))

    def wait_after_crash() -> tuple[float, float]:
        """Bounds of the time until its next start, counted from when its end was noticed."""
        while True:
            before = time.monotonic()
            if supervisor.poll() == [child]:
                assert child.restart_at is not None
                return child.restart_at - time.monotonic(), child.restart_at - before
            time.sleep(0.02)

    least, most = wait_after_crash()
    assert child.crashes == 1
    assert least <= 0.5 <= most
    first = child.process
    least, most = wait_after_crash()
    assert child.process is not first
    assert child.crashes == 2
    assert least <= 1.0 <= most


def test_stop_is_in_reverse_order_and_kills_what_does_not_listen(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = tmp_path / "order"
    order.touch()
    note = """
        import signal, sys, time
        def end(*_):
            open({order!r}, "a").write({name!r} + " ")
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        print("up", flush=True)
        time.sleep(600)
        """
    deaf = """
        import signal, time
        signal.signal(signal.SIGTERM, lambda *_: open({order!r}, "a").write("deaf "))
        print("up", flush=True)
        while True:
            time.sleep(600)
        """
    children = [
        supervisor.add(python("a", note.format(order=str(order), name="a"))),
        supervisor.add(python("deaf", deaf.format(order=str(order)), stop_seconds=0.5)),
        supervisor.add(python("c", note.format(order=str(order), name="c"))),
    ]
    until(lambda: all("up" in child.tail for child in children))
    pids = [child.process.pid for child in children if child.process]
    clock = Clock(lambda: "deaf" in order.read_text())
    monkeypatch.setattr("cli.supervisor.time", clock)
    supervisor.stop(never)
    assert order.read_text() == "c deaf a "
    assert not any(is_running(pid) for pid in pids)
    assert 0.5 <= clock.now < 5


def test_a_retired_child_ends_without_being_waited_for_and_is_not_started_again(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(600)"
    child = supervisor.add(python("deaf", deaf, stop_seconds=2))
    until(lambda: "up" in child.tail)
    assert child.process is not None
    pid, clock = child.process.pid, Clock(never)
    monkeypatch.setattr("cli.supervisor.time", clock)
    supervisor.retire(child)
    for clock.now in (0.0, 1.9):
        assert supervisor.poll() == []
        assert is_running(pid)
    clock.now = 2.1
    assert supervisor.poll() == []
    assert not is_running(pid)
    clock.now = 600.0
    assert supervisor.poll() == []
    assert not child.alive


def test_hurry_kills_at_once(supervisor: Supervisor) -> None:
    child = supervisor.add(
        python(
            "deaf",
            "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(600)",
            stop_seconds=60,
        )
    )
    until(lambda: "up" in child.tail)
    started = time.monotonic()
    supervisor.stop(lambda: True)
    assert time.monotonic() - started < 30


def test_a_stop_takes_grandchildren_of_the_group(supervisor: Supervisor) -> None:
    child = supervisor.add(
        python(
            "mother",
            "import subprocess, time; p = subprocess.Popen(['sleep', '600']); print(p.pid); time.sleep(600)",
        )
    )
    until(lambda: len(child.tail) == 1)
    grandchild = int(child.tail[0])
    assert is_running(grandchild)
    supervisor.stop(never)
    until(lambda: not is_running(grandchild))


def test_signals_are_counted_not_raised() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        request = StopRequest().install()
        assert not request
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: bool(request))
        assert not request.hurry
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: request.hurry)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
