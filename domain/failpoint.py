"""Named places where a fault test lets a process die, freeze or meet a full disk.

Off unless RATCHET_FAILPOINT is set, and then still a comparison of two strings everywhere but at the place
that it names. Its value is `NAME ACTION MARKER`: the first process that comes to NAME and can create the
file MARKER does ACTION there (`kill`: SIGKILL to itself, `stop`: SIGSTOP, `full`: raises ENOSPC). The
marker makes a fault happen once, whoever takes the work up again.
"""

import errno
import os
import signal

VARIABLE = "RATCHET_FAILPOINT"
_armed: tuple[str, str, str] | None = None


def arm(text: str | None) -> None:
    """Set or (None, empty) clear this process's failpoint. Raises ValueError for what is none."""
    global _armed
    if not text:
        _armed = None
        return
    parts = text.split(maxsplit=2)
    if len(parts) != 3 or parts[1] not in ("kill", "stop", "full"):
        raise ValueError(f"{VARIABLE} must be 'NAME kill|stop|full MARKER', not '{text}'.")
    _armed = (parts[0], parts[1], parts[2])


def failpoint(name: str) -> None:
    """A place where work done so far and work still to do must both survive this process's death."""
    if _armed is None or _armed[0] != name:
        return
    _, action, marker = _armed
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return
    if action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


arm(os.environ.get(VARIABLE))
