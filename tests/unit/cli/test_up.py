"""What `ratchet up` says when it cannot start."""

import socket
from pathlib import Path

import pytest

from cli.errors import CliError
from cli.up import migrate
from domain.settings import Settings
from registry import postgresql


@pytest.mark.parametrize(("listening", "told"), [(False, "refused"), (True, "timeout")])
def test_a_database_that_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listening: bool, told: str
) -> None:
    monkeypatch.setitem(postgresql.LIMITS, "connect_timeout", 2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:  # and never saying a word
            server.listen()
        url = f"postgresql+psycopg://ratchet:secret@127.0.0.1:{server.getsockname()[1]}/ratchet"
        with pytest.raises(CliError, match=f"RATCHET_DATABASE_URL.*{told}") as caught:
            migrate(Settings(home=tmp_path, database_url=url))
    assert "secret" not in str(caught.value)
