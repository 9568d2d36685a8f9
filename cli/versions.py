"""`ratchet versions`, `matrix`, `promote`, `rollback`, `history` and `chat`."""

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cli.assistants import Assistant
from cli.client import Client, Json
from cli.output import AsJson, emit, fields, out, score_cell, table, when

versions_app = typer.Typer(no_args_is_help=True, help="Immutable results of updates.")
VersionName = Annotated[str, typer.Argument(metavar="VERSION", help="A version, like v2.")]
Alias = Annotated[str, typer.Option(help="The alias that is meant.")]


@versions_app.command("list")
def list_versions(assistant: Assistant, as_json: AsJson = False) -> None:
    """The versions of an assistant; v0 is its base model."""
    with Client.from_environment() as client:
        found = client.list_all(f"/v1/assistants/{assistant}/versions")
    rows = [
        (
            version["version"],
            version["kind"],
            version["parent"] or "",
            version["verdict"]["outcome"] if version["verdict"] else "",
            version["update"] or "",
            when(version["created_at"]),
        )
        for version in found
    ]
    columns = ["version", "kind", "parent", "verdict", "update", "created"]
    emit(found, as_json, lambda: table(columns, rows))


@versions_app.command("show")
def show_version(assistant: Assistant, version: VersionName, as_json: AsJson = False) -> None:
    """One version: lineage, recipe, manifest, measurements, verdict."""
    with Client.from_environment() as client:
        found = client.get(f"/v1/assistants/{assistant}/versions/{version}")
    emit(found, as_json, lambda: fields(found, [name for name in found if name != "object"]))


@versions_app.command("pin")
def pin_version(assistant: Assistant, version: VersionName, as_json: AsJson = False) -> None:
    """Keep the version's files, whatever retention's policy says."""
    _pin(assistant, version, True, as_json)


@versions_app.command("unpin")
def unpin_version(assistant: Assistant, version: VersionName, as_json: AsJson = False) -> None:
    """Leave the version's files to retention's policy again."""
    _pin(assistant, version, False, as_json)


def _pin(assistant: str, version: str, pinned: bool, as_json: bool) -> None:
    with Client.from_environment() as client:
        found = client.patch(f"/v1/assistants/{assistant}/versions/{version}", {"pinned": pinned})
    emit(found, as_json, lambda: f"{assistant}@{version} is {'' if found['pinned'] else 'not '}pinned")


def matrix(assistant: Assistant, as_json: AsJson = False) -> None:
    """Scores of every version on every skill, with 95% intervals; - is unmeasured."""
    with Client.from_environment() as client:
        found = client.get(f"/v1/assistants/{assistant}/matrix")
    emit(found, as_json, lambda: matrix_table(found))


def matrix_table(found: Json) -> Table:
    versions = [version["version"] for version in found["versions"]]
    rows: list[list[str | Text]] = []
    for kind, scores in (("", found["scores"]), ("general: ", found["general"])):
        for suite, cells in scores.items():
            rows.append([kind + suite, *(score_cell(cells.get(version)) for version in versions)])
    return table(["skill", *versions], rows)


def promote(
    assistant: Assistant,
    version: VersionName,
    alias: Alias = "champion",
    reason: Annotated[str, typer.Option(help="Kept in the alias's history.")] = "",
    override: Annotated[bool, typer.Option(help="Serve a version that its gate blocked.")] = False,
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version and wait until it serves."""
    path = f"/v1/assistants/{assistant}/aliases/{alias}"
    with Client.from_environment() as client:
        moved = client.put(path, {"version": version, "reason": reason, "override": override})
    emit(moved, as_json, lambda: moved_line(moved))


def rollback(
    assistant: Assistant,
    to: Annotated[str | None, typer.Option(help="A version; default: the one that served before.")] = None,
    reason: Annotated[str, typer.Option(help="Kept in the alias's history.")] = "",
    as_json: AsJson = False,
) -> None:
    """Serve an earlier version again."""
    body: Json = {"reason": reason} | ({"to": to} if to else {})
    with Client.from_environment() as client:
        moved = client.post(f"/v1/assistants/{assistant}/rollback", body)
    emit(moved, as_json, lambda: moved_line(moved))


def moved_line(moved: Json) -> str:
    """An alias after a move, in one line."""
    text = f"{moved['alias']}: {moved['from_version'] or '(new)'} -> {moved['to_version']}"
    waits = "" if moved["serving"] else "; not serving yet, the swap goes on"
    return f"{text} (revision {moved['revision']}{waits})"


def history(assistant: Assistant, alias: Alias = "champion", as_json: AsJson = False) -> None:
    """Every move of an alias, newest first."""
    with Client.from_environment() as client:
        found = client.list_all(f"/v1/assistants/{assistant}/aliases/{alias}/history")
    rows = [
        (
            str(move["revision"]),
            move["from_version"] or "",
            move["to_version"],
            move["kind"],
            move["actor"],
            move["reason"],
            when(move["created_at"]),
        )
        for move in found
    ]
    columns = ["revision", "from", "to", "kind", "actor", "reason", "at"]
    emit(found, as_json, lambda: table(columns, rows))


def chat(
    model: Annotated[str, typer.Argument(help="assistant, assistant@alias or assistant@v2.")],
    message: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    as_json: AsJson = False,
) -> None:
    """Talk to an assistant."""
    with Client.from_environment() as client:
        if message is not None:
            reply = client.chat(model, [{"role": "user", "content": message}], max_tokens=max_tokens)
            emit({"text": reply.text, "version": reply.version}, as_json, lambda: Text(reply.text))
            return
        turns: list[Json] = []
        while question := ask():
            turns.append({"role": "user", "content": question})
            reply = client.chat_streamed(model, turns, max_tokens=max_tokens, on_piece=print_piece)
            print()
            turns.append({"role": "assistant", "content": reply.text})


def print_piece(text: str) -> None:
    print(text, end="", flush=True)


def ask() -> str:
    """The next question; empty at the end of the conversation."""
    try:
        return out.input("you> ").strip()
    except EOFError:
        return ""
