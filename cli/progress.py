"""A live line for a running update, fed by its events."""

import sys
import time
from collections.abc import Iterable
from typing import IO

from cli.client import Json

PLAIN_SECONDS = 15.0
"""Off a terminal, at most one progress line in this time besides those that open a phase."""


class ProgressLine:
    """Rewrites one line on a terminal; elsewhere prints a line now and then."""

    def __init__(self, label: str, stream: IO[str] | None = None) -> None:
        self.stage_seconds: dict[str, float] = {}
        """Phase -> wall seconds, as the worker measured them; known at the end."""
        self.swap_seconds: float | None = None
        """From the alias's move until the new version answered; None when it was not served."""
        self._label = label
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._printed_at = 0.0
        self._width = 0

    def follow(self, events: Iterable[Json]) -> None:
        try:
            for event in events:
                self.note(event)
        finally:
            self.end_line()

    def note(self, event: Json) -> None:
        """Show one event and keep the times that it tells."""
        kind, data = event["type"], event["data"]
        self.stage_seconds = data.get("stage_seconds", self.stage_seconds)
        self.swap_seconds = data.get("swap_seconds", self.swap_seconds)
        if kind == "phase":
            self._show(f"{data['phase']}", keep=True)
        elif kind == "metrics":
            self._show(describe_metrics(data))
        elif kind == "verdict" or event["level"] != "info":
            self._show(event["message"], keep=True)
        else:
            self._show(event["message"])

    def _show(self, text: str, keep: bool = False) -> None:
        line = f"{self._label}: {text}"
        if self._live:
            self._stream.write("\r" + line.ljust(self._width) + ("\n" if keep else ""))
            self._width = 0 if keep else len(line)
        elif keep or time.monotonic() - self._printed_at >= PLAIN_SECONDS:
            self._printed_at = time.monotonic()
            self._stream.write(line + "\n")
        self._stream.flush()

    def end_line(self) -> None:
        """Let what is printed next begin on a line of its own."""
        if self._live and self._width:
            self._stream.write("\n")
            self._width = 0


def describe_metrics(data: Json) -> str:
    """A training step or another measured stage in one short line."""
    if "step" not in data:
        return ", ".join(f"{name} {value}" for name, value in data.items())
    text = f"training step {data['step']}/{data['steps']}"
    for name, label in (("loss", "loss"), ("rehearsal_kl", "rehearsal KL"), ("response_tokens", "tokens")):
        if data.get(name) is not None:
            text += f", {label} {data[name]:.3g}"
    return f"{text}, {data['eta_seconds']:.0f} s to go" if "eta_seconds" in data else text
