"""The folder of one installation: created, checked and locked."""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from cli.errors import CliError

MAX_SOCKET_PATH = 107
"""Bytes that sockaddr_un.sun_path holds besides its final zero."""


def socket_path(home: Path) -> Path:
    """Of the embedded Valkey. Raises CliError when the operating system could not bind it."""
    path = home / "valkey.sock"
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise CliError(
            f"{path} is {length} bytes long, but a Unix socket's path may have at most {MAX_SOCKET_PATH}: "
            f"choose a shorter --home (at most {MAX_SOCKET_PATH - len('/valkey.sock')} bytes)"
        )
    return path


class HomeLock:
    """One supervisor per home; the kernel frees the lock when its holder dies."""

    def __init__(self, home: Path) -> None:
        self._file: IO[str] | None = None
        self._home = home

    def __enter__(self) -> Self:
        """Raises CliError when the home cannot be written or another supervisor holds it."""
        path = self._home / "ratchet.lock"
        try:
            self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = path.open("a+")
        except OSError as error:
            raise CliError(f"the home {self._home} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise CliError(
                f"the home {self._home} is in use by {holder}: stop that one first, or choose another --home"
            ) from error
        return self

    def describe(self, text: str) -> None:
        """What a second supervisor is told about the holder."""
        assert self._file is not None
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
