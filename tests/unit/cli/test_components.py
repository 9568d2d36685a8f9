import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from cli import components
from cli.supervisor import Supervisor
from domain.settings import Settings


def test_children_get_the_short_lease_unless_the_user_said_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path)
    monkeypatch.setenv("RATCHET_HEARTBEAT_SECONDS", "7")
    monkeypatch.delenv("RATCHET_LEASE_SECONDS", raising=False)
    environment = components.base_environment(settings)
    assert environment["RATCHET_HOME"] == str(tmp_path)
    assert environment["RATCHET_LEASE_SECONDS"] == "20"
    assert environment["RATCHET_HEARTBEAT_SECONDS"] == "7"


def test_every_child_has_its_own_thread_budget(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, engine_threads=3, trainer_threads=5)
    engine = components.Engine(settings, "some/model", "engine").component
    assert engine.environment["OMP_NUM_THREADS"] == "3"
    assert components.worker(settings).environment["OMP_NUM_THREADS"] == "5"
    assert components.dispatcher(settings).environment["OMP_NUM_THREADS"] == "1"
    assert engine.environment["OMP_WAIT_POLICY"] == "PASSIVE"


def test_an_engine_takes_a_fresh_port_at_every_start(tmp_path: Path) -> None:
    engine = components.Engine(Settings(home=tmp_path), "some/model", "engine")
    with socket.socket() as taken:
        first = engine.component.command()
        port = int(engine.url.rsplit(":", 1)[1])
        assert str(port) in first
        taken.bind(("127.0.0.1", port))
        engine.component.command()
        assert not engine.url.endswith(f":{port}")


def test_valkey_is_durable_and_has_no_tcp_port() -> None:
    with tempfile.TemporaryDirectory(prefix="ratchet-valkey-") as folder:
        home = Path(folder)
        socket_file = home / "valkey.sock"
        supervisor = Supervisor(home / "logs")
        child = supervisor.add(components.valkey(Settings(home=home), socket_file))
        try:
            while not components.valkey_answers(socket_file):
                assert child.alive, list(child.tail)
                time.sleep(0.02)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(socket_file))
                connection.sendall(b"CONFIG GET appendonly\r\nRPUSH q one\r\n")
                reply = connection.recv(4096)
                while b":1\r\n" not in reply:
                    reply += connection.recv(4096)
            assert b"yes" in reply
            assert child.process is not None
            sockets = subprocess.run(
                ["ls", "-l", f"/proc/{child.process.pid}/fd"], capture_output=True, text=True
            )
            inodes = {
                line.split("socket:[")[1].rstrip("]")
                for line in sockets.stdout.splitlines()
                if "socket:[" in line
            }
            listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            assert not [row for row in listening if row[9] in inodes]
            child.process.kill()
            child.process.wait()
            while not components.valkey_answers(socket_file):
                supervisor.poll()
                time.sleep(0.02)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(socket_file))
                connection.sendall(b"LLEN q\r\n")
                assert connection.recv(64) == b":1\r\n"
        finally:
            supervisor.stop(lambda: False)
