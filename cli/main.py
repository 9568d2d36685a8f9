"""The commands of `ratchet`. Each talks to the API over HTTP; `up`, `demo`, `doctor`, `train` and `preflight`
run things."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli import assistants, bench, doctor, traffic, train, updates, versions
from cli.client import DEFAULT_PORT
from cli.demo import demo
from cli.errors import CliError
from cli.fsck import fsck
from cli.output import AsJson
from domain.settings import Settings

BackupFolder = Annotated[Path, typer.Argument(help="`backup`: new or empty; `restore`: what it wrote.")]
Home = Annotated[Path | None, typer.Option(help="Default RATCHET_HOME or ~/.ratchet.", show_default=False)]


class Commands(TyperGroup):
    """Turns the errors that a person should read into one line and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CliError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output left: nothing more to say
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Teach a deployed assistant from demonstrations, measure, and roll back.",
)
app.add_typer(assistants.assistants_app, name="assistants")
app.add_typer(assistants.skills_app, name="skills")
app.add_typer(assistants.demos_app, name="demos")
app.add_typer(updates.updates_app, name="updates")
app.add_typer(versions.versions_app, name="versions")
app.add_typer(bench.bench_app, name="bench")
app.command()(updates.update)
app.command()(versions.matrix)
app.command()(versions.promote)
app.command()(versions.rollback)
app.command()(traffic.traffic)
app.command()(versions.history)
app.command()(versions.chat)
app.command(cls=train.Command)(train.train)
app.command(cls=train.Command)(train.preflight)
app.command()(doctor.doctor)
app.command()(demo)
app.command()(fsck)


@app.command()
def backup(folder: BackupFolder, home: Home = None, as_json: AsJson = False) -> None:
    """Copy the ledger and every version's files while the stack runs, and verify the copy."""
    from cli.backup import back_up  # SQLAlchemy takes a second: not for every command

    back_up(folder, _settings(home), as_json)


@app.command()
def restore(folder: BackupFolder, home: Home = None, as_json: AsJson = False) -> None:
    """Make a new home from a backup: the home must be new or empty, and appears only when all is verified.

    With RATCHET_DATABASE_URL or RATCHET_ARTIFACTS_URL set, these are filled instead; the database must have
    no tables.
    """
    from cli.backup import bring_back

    bring_back(folder, _settings(home), as_json)


def _settings(home: Path | None) -> Settings:
    return Settings() if home is None else Settings(home=home)


@app.command()
def up(
    home: Annotated[
        Path | None, typer.Option(help="All state; default RATCHET_HOME or ~/.ratchet.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = DEFAULT_PORT,
) -> None:
    """Run the embedded stack until Ctrl-C. Prints `ready URL` when everything answers."""
    from cli.up import up as run_stack  # SQLAlchemy takes a second: not for every command

    run_stack(home or Settings().home, port, lambda line: print(line, flush=True))
