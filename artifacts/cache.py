"""Local copies of versions whose files are kept elsewhere, within a bound.

Who uses a copy holds a shared flock on a file beside it, and who wants its room an exclusive one: so nothing
that is read or served goes, and the kernel takes a lock back when its holder's process ends, however it ends.
The file's time is when the version was last used. Locks need a local file system.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from artifacts.files import require_version_id
from artifacts.store import ArtifactStore

logger = logging.getLogger(__name__)

_USE = ".in-use-"
"""Beginning of a lock file's name, before the version's id."""


class VersionCache(ArtifactStore):
    """At most `max_bytes` of versions, but for those in use; the least recently used make room first."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        super().__init__(root)
        self.max_bytes = max_bytes

    @contextmanager
    def held(self, version_id: str) -> Iterator[None]:
        """The version's copy, there now or fetched within the block, is not removed to make room.

        Holds on through `exec`, so that a process which becomes an engine needs no other one to watch over
        its files. Any number may hold the same version. Raises CorruptArtifact for an id that cannot be one.
        """
        lock = self._lock(version_id, fcntl.LOCK_SH)
        assert lock is not None  # it waits
        try:
            os.set_inheritable(lock, True)
            os.utime(lock)
            yield
            os.utime(lock)
        finally:
            os.close(lock)

    def make_room(self, incoming: int) -> None:
        """Remove copies that nobody uses until `incoming` more bytes fit, or none is left."""
        copies = {one.version_id: _size(self.path(one.version_id)) for one in self.stored()}
        used = sum(copies.values())
        locks = [path.name.removeprefix(_USE) for path in self.root.glob(f"{_USE}*")]
        for version_id in sorted({*copies, *locks}, key=self._last_used):
            size = copies.get(version_id)
            if (size is None or used + incoming > self.max_bytes) and self._remove(version_id):
                used -= size or 0
        if used + incoming > self.max_bytes:
            logger.warning(
                "%s: %d bytes are in use, %d more are needed, RATCHET_ARTIFACTS_CACHE_BYTES allows %d",
                self.root,
                used,
                incoming,
                self.max_bytes,
            )

    def _remove(self, version_id: str) -> bool:
        """The copy and its lock file, unless somebody uses it, which counts as a use of now."""
        lock = self._lock(version_id, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            with suppress(FileNotFoundError):  # somebody else has just removed it
                os.utime(self._lock_file(version_id))
            return False
        try:
            self.delete(version_id)
            self._lock_file(version_id).unlink()
        finally:
            os.close(lock)
        return True

    def _lock(self, version_id: str, how: int) -> int | None:
        """A descriptor with the version's lock, or None when another process or thread has it."""
        path = self._lock_file(version_id)
        self.root.mkdir(parents=True, exist_ok=True)
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, how)
                if os.path.samestat(os.fstat(lock), path.stat()):
                    return lock
            except BlockingIOError:
                os.close(lock)
                return None
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)  # it was removed with its copy before we had it

    def _lock_file(self, version_id: str) -> Path:
        return self.root / f"{_USE}{require_version_id(version_id)}"

    def _last_used(self, version_id: str) -> float:
        for path in (self._lock_file(version_id), self.path(version_id)):
            try:
                return path.stat().st_mtime
            except FileNotFoundError:
                continue
        return 0.0


def _size(folder: Path) -> int:
    """Bytes of its files; one that is being removed has those that are left."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total
