"""`ratchet update` and `ratchet updates`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.assistants import Assistant, read_bytes
from cli.client import Client, Json
from cli.errors import CliError
from cli.output import AsJson, emit, fields, table, when
from cli.progress import ProgressLine

updates_app = typer.Typer(no_args_is_help=True, help="Training jobs.")
UpdateId = Annotated[str, typer.Argument(help="Id of an update.")]
SHOWN = ("id", "status", "phase", "skills", "parent_version", "version", "verdict", "error", "recipe")


def update(
    assistant: Assistant,
    skill: Annotated[
        list[str] | None, typer.Option(help="Teach only these; default: all with new demonstrations.")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="name=value, or a JSON file; may be repeated, the last wins.")
    ] = None,
    gate: Annotated[list[str] | None, typer.Option(help="The gate's rules, as for --recipe.")] = None,
    publish: Annotated[
        Literal["auto", "hold"], typer.Option(help="hold: keep a version that passes, but don't serve it.")
    ] = "auto",
    wait: Annotated[bool, typer.Option(help="Follow it to its end; exit 1 unless it passes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Teach an assistant the demonstrations that no update has taught yet."""
    body: Json = {"publish": publish, **update_wishes(recipe, gate)}
    if skill:
        body["skills"] = skill
    with Client.from_environment() as client:
        made = client.post(f"/v1/assistants/{assistant}/updates", body)
        if wait:
            ProgressLine(made["id"]).follow(client.follow(made["id"]))
            made = client.get(f"/v1/updates/{made['id']}")
    emit(made, as_json, lambda: fields(made, SHOWN))
    if wait:
        require_passed(made)


def update_wishes(recipe: list[str] | None, gate: list[str] | None) -> Json:
    """`recipe` and `gate` of an update's body, where they were given. Raises CliError."""
    given = {"recipe": recipe, "gate": gate}
    return {name: parse_settings(texts, f"--{name}") for name, texts in given.items() if texts}


def require_passed(update: Json) -> None:
    """Raises CliError saying why an update made no version that may serve."""
    if update["status"] == "failed":
        raise CliError(f"update {update['id']} failed: {update['error']['message']}")
    if update["status"] != "succeeded":
        raise CliError(f"update {update['id']} is {update['status']}")
    if update["verdict"]["outcome"] != "pass":
        reasons = "; ".join(update["verdict"]["reasons"])
        raise CliError(f"the gate said {update['verdict']['outcome']} to {update['id']}: {reasons}")


@updates_app.command("list")
def list_updates(assistant: Assistant, as_json: AsJson = False) -> None:
    """The updates of an assistant, oldest first."""
    with Client.from_environment() as client:
        found = client.list_all(f"/v1/assistants/{assistant}/updates")
    rows = [
        (
            update["id"],
            update["status"],
            update["phase"] or "",
            ", ".join(update["skills"]),
            str(update["version"] or ""),
            update["verdict"]["outcome"] if update["verdict"] else "",
            when(update["created_at"]),
        )
        for update in found
    ]
    columns = ["update", "status", "phase", "skills", "version", "verdict", "created"]
    emit(found, as_json, lambda: table(columns, rows))


@updates_app.command("show")
def show_update(update_id: UpdateId, as_json: AsJson = False) -> None:
    """One update: state, recipe, verdict."""
    with Client.from_environment() as client:
        found = client.get(f"/v1/updates/{update_id}")
    emit(found, as_json, lambda: fields(found, SHOWN))


@updates_app.command("cancel")
def cancel(update_id: UpdateId, as_json: AsJson = False) -> None:
    """Stop an update for good; it will never publish."""
    _ask(update_id, "cancel", as_json)


@updates_app.command("pause")
def pause(update_id: UpdateId, as_json: AsJson = False) -> None:
    """Stop an update at its next checkpoint; `resume` continues it."""
    _ask(update_id, "pause", as_json)


@updates_app.command("resume")
def resume(update_id: UpdateId, as_json: AsJson = False) -> None:
    """Put a paused update back into the queue."""
    _ask(update_id, "resume", as_json)


def _ask(update_id: str, verb: str, as_json: bool) -> None:
    with Client.from_environment() as client:
        found = client.post(f"/v1/updates/{update_id}/{verb}", {})
    emit(found, as_json, lambda: fields(found, SHOWN))


def parse_settings(settings: list[str], option: str) -> Json:
    """`name=value` pairs and JSON files, merged in order; a value is JSON where it parses as such.

    Raises CliError naming the option when one is neither.
    """
    merged: Json = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if equals:
            merged[name.strip()] = _value(value)
            continue
        try:
            loaded = json.loads(read_bytes(Path(text)))
        except json.JSONDecodeError as error:
            raise CliError(f"{option} {text}: not valid JSON: {error}") from error
        if not isinstance(loaded, dict):
            raise CliError(f"{option} {text}: the file must hold one JSON object")
        merged |= loaded
    return merged


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
