"""What a real engine's log tells: `--port 0` takes a port that nobody else can have taken in between."""

import json
from pathlib import Path


def port_in(log: Path) -> int | None:
    """Where the engine listens; None until it answers."""
    for line in log.read_text().split("\n")[:-1]:
        if line.startswith("{") and (told := json.loads(line))["message"] == "ready":
            return int(told["port"])
    return None
