"""`ratchet assistants`, `ratchet skills`, `ratchet demos`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cli.client import Client, Json
from cli.errors import CliError
from cli.output import AsJson, emit, fields, show, table, when

assistants_app = typer.Typer(no_args_is_help=True, help="Deployed, teachable models.")
skills_app = typer.Typer(no_args_is_help=True, help="Named abilities of an assistant.")
demos_app = typer.Typer(no_args_is_help=True, help="Demonstrations of a skill.")

Assistant = Annotated[str, typer.Argument(help="Name or id of an assistant.")]
Skill = Annotated[str, typer.Argument(help="Name or id of a skill.")]


@assistants_app.command("list")
def list_assistants(as_json: AsJson = False) -> None:
    """All assistants, oldest first."""
    with Client.from_environment() as client:
        found = client.list_all("/v1/assistants")
    rows = [(a["name"], a["base_model"], when(a["created_at"]), a["id"]) for a in found]
    emit(found, as_json, lambda: table(["assistant", "base model", "created", "id"], rows))


@assistants_app.command("create")
def create_assistant(
    name: Annotated[str, typer.Argument(help="Lower case letters, digits, - and _.")],
    base_model: Annotated[
        str, typer.Option(help="A built-in name, the absolute path of a model folder, or a hub id.")
    ] = "smollm2-135m-instruct",
    as_json: AsJson = False,
) -> None:
    """Create an assistant; its version v0 is the base model."""
    with Client.from_environment() as client:
        made = client.post("/v1/assistants", {"name": name, "base_model": base_model})
    emit(made, as_json, lambda: f"created assistant {made['name']} ({made['id']})")


@assistants_app.command("show")
def show_assistant(assistant: Assistant, as_json: AsJson = False) -> None:
    """One assistant with its aliases."""
    with Client.from_environment() as client:
        found = client.get(f"/v1/assistants/{assistant}")
    emit(found, as_json, lambda: fields(found, [name for name in found if name != "object"]))


@skills_app.command("list")
def list_skills(assistant: Assistant, as_json: AsJson = False) -> None:
    """The skills of an assistant."""
    with Client.from_environment() as client:
        found = client.list_all(f"/v1/assistants/{assistant}/skills")
    rows = [(s["name"], show(s["grader"]), f"{s['holdout_fraction']:.2f}", s["description"]) for s in found]
    emit(found, as_json, lambda: table(["skill", "grader", "held out", "description"], rows))


@skills_app.command("create")
def create_skill(
    assistant: Assistant,
    name: Annotated[str, typer.Argument(help="Lower case letters, digits, - and _.")],
    grader: Annotated[
        str, typer.Option(help='A type ("exact", "contains" ...) or JSON: {"type":"regex","pattern":"..."}')
    ] = "exact",
    description: Annotated[str, typer.Option(help="For people.")] = "",
    holdout_fraction: Annotated[
        float | None, typer.Option(help="Share of demonstrations kept for measuring.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create a skill: how its answers are graded, and how many demonstrations measure it."""
    body: Json = {"name": name, "description": description, "grader": parse_grader(grader)}
    if holdout_fraction is not None:
        body["holdout_fraction"] = holdout_fraction
    with Client.from_environment() as client:
        made = client.post(f"/v1/assistants/{assistant}/skills", body)
    emit(made, as_json, lambda: f"created skill {made['name']} ({made['id']})")


@skills_app.command("show")
def show_skill(assistant: Assistant, skill: Skill, as_json: AsJson = False) -> None:
    """One skill with its grader."""
    with Client.from_environment() as client:
        found = client.get(f"/v1/assistants/{assistant}/skills/{skill}")
    emit(found, as_json, lambda: fields(found, [name for name in found if name != "object"]))


@demos_app.command("push")
def push(
    assistant: Assistant,
    skill: Skill,
    file: Annotated[Path, typer.Argument(help="JSONL, one demonstration per line; - is standard input.")],
    dry_run: Annotated[bool, typer.Option(help="Check every line, store nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send a file of demonstrations: all of it is accepted, or none."""
    body = read_bytes(file)
    with Client.from_environment() as client:
        path = f"/v1/assistants/{assistant}/skills/{skill}/demonstrations"
        result = client.post_jsonl(path, body, dry_run=dry_run)
    emit(
        result,
        as_json,
        lambda: (
            f"{'would accept' if dry_run else 'accepted'} {result['accepted']} demonstrations "
            f"({result['train']} to teach, {result['holdout']} held out), "
            f"{result['duplicates']} known already"
        ),
    )


@demos_app.command("list")
def list_demonstrations(assistant: Assistant, skill: Skill, as_json: AsJson = False) -> None:
    """The demonstrations of a skill."""
    with Client.from_environment() as client:
        found = client.list_all(f"/v1/assistants/{assistant}/skills/{skill}/demonstrations")
    rows = [(d["split"], d["messages"][-1]["content"], d["response"]) for d in found]
    emit(found, as_json, lambda: table(["split", "prompt", "response"], rows))


def parse_grader(text: str) -> Json:
    """`exact` or `{"type": ...}`. Raises CliError when it looks like JSON and is not."""
    if not text.lstrip().startswith("{"):
        return {"type": text}
    try:
        grader: Json = json.loads(text)
    except json.JSONDecodeError as error:
        raise CliError(f"--grader is not valid JSON: {error} (field: grader)") from error
    return grader


def read_bytes(file: Path) -> bytes:
    """A file, or standard input for `-`. Raises CliError when it cannot be read."""
    try:
        return typer.get_binary_stream("stdin").read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise CliError(f"{file} cannot be read: {error.strerror}") from error
