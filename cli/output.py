"""How the command line prints: one JSON value with `--json`, else a table for people."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.client import Json

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as the API gave it.")]
FILE_WIDTH = 140
"""Columns of what is not printed to a terminal."""


def width(stream: IO[str]) -> int | None:
    """None: as wide as the terminal is."""
    return None if stream.isatty() else FILE_WIDTH


# What users wrote may hold [brackets] and :colons: - they are text, not markup.
out = Console(highlight=False, markup=False, emoji=False, width=width(sys.stdout))
err = Console(stderr=True, highlight=False, markup=False, emoji=False, width=width(sys.stderr))

SCORE_COLOURS = ((0.7, "green"), (0.4, "yellow"), (0.0, "red"))
"""Lower bound of a score and its colour, best first."""


def emit(value: Any, as_json: bool, render: Callable[[], Any]) -> None:
    """Print `value` as JSON, or what `render` makes of it."""
    if as_json:
        print(json.dumps(value, ensure_ascii=False, indent=2))
    else:
        out.print(render())


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], title: str | None = None) -> Table:
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def fields(value: Json, names: Sequence[str]) -> Table:
    """One object, one line per field that it has."""
    rows = [(name, show(value[name])) for name in names if value.get(name) is not None]
    made = table(["", ""], rows)
    made.show_header = False
    return made


def show(value: Any) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def when(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds is not None else ""


def score_cell(cell: Json | None) -> Text:
    """`0.83 [0.70, 0.92] n=40`, coloured; an unmeasured score is a dash, never a zero."""
    if cell is None:
        return Text("-", style="dim")
    colour = next((colour for least, colour in SCORE_COLOURS if cell["score"] >= least), "red")
    text = Text(f"{cell['score']:.2f}", style=f"bold {colour}")
    return text.append(f" [{cell['low']:.2f}, {cell['high']:.2f}] n={cell['n']}", style="dim")
