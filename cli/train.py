"""`ratchet train` and `ratchet preflight`: the trainer without a service, a database or a broker."""

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperCommand
from typer.exceptions import TyperException

from cli.client import Json
from cli.errors import CliError
from cli.output import AsJson, emit, err, fields
from cli.preflight_report import render, render_finding
from cli.progress import ProgressLine
from cli.trainer_process import REFUSED, STOPPED, run_trainer
from cli.training_inputs import Inputs, Options, read_inputs
from cli.training_output import OutputFolder, TrainingRecord
from domain.preflight import PreflightReport
from domain.recipe import Method
from domain.skill import DEFAULT_HOLDOUT_FRACTION
from domain.training import (
    CheckpointLine,
    FailedLine,
    PreflightLine,
    RefusedLine,
    StepLine,
    TrainerLine,
    describe,
)

EXIT_REFUSED = 2
EXIT_INTERRUPTED = os.EX_TEMPFAIL

Base = Annotated[str, typer.Option(help="A model folder, a hub id or a built-in name.", show_default=False)]
Demonstrations = Annotated[Path, typer.Option(help="JSONL, one demonstration per line; - is standard input.")]
MethodName = Annotated[Method | None, typer.Option(help="Default: the recipe's, sdft.")]
RecipeFile = Annotated[
    list[str] | None, typer.Option("--recipe", help="JSON file with recipe fields; may be repeated.")
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="One recipe field; wins over the file; repeatable."),
]
GraderText = Annotated[
    str, typer.Option("--grader", help='A type ("exact", "contains" ...) or JSON: {"type":"regex", ...}')
]
HoldoutFraction = Annotated[
    float, typer.Option(min=0, max=0.9, help="Share of the prompts kept for measuring, by their hash.")
]
Rehearsal = Annotated[
    Path | None,
    typer.Option(help="JSONL with prompts to stay the same on; default: the built-in ordinary ones."),
]
RolloutUrl = Annotated[
    str | None,
    typer.Option(
        envvar="RATCHET_ROLLOUT_URL",
        help="A running inference server of the base (vLLM, or the embedded engine) that draws the student's "
        "answers; default: the trainer draws them.",
        show_default=False,
    ),
]
Parent = Annotated[Path | None, typer.Option(help="Folder of an earlier training to start from.")]


class Command(TyperCommand):
    """A wrong option is bad input: status 1, since 2 says that preflight refuses."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:
            error.exit_code = 1
            raise


def train(
    base: Base,
    demonstrations: Demonstrations,
    out: Annotated[Path, typer.Option(help="Receives the trained model; made where it is missing.")],
    method: MethodName = None,
    recipe: RecipeFile = None,
    settings: Setting = None,
    grader: GraderText = "exact",
    holdout_fraction: HoldoutFraction = DEFAULT_HOLDOUT_FRACTION,
    rehearsal: Rehearsal = None,
    parent: Parent = None,
    rollout_url: RolloutUrl = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Default: OUT/checkpoints, removed when done.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train on a file of demonstrations; needs no service.

    Ctrl-C leaves a checkpoint, and the same command goes on from it. Exit status: 0 done, 1 bad input,
    2 refused by preflight, 75 interrupted.
    """
    inputs = read_inputs(
        Options(
            base, demonstrations, method, recipe or [], settings or [], grader, holdout_fraction, rehearsal,
            parent, rollout_url,
        )
    )  # fmt: skip
    output = OutputFolder(out, checkpoints, inputs)
    record = output.finished()
    if record is not None:
        err.print(f"{out} holds this very training, done")
    else:
        with output.opened():
            record = _train(output, inputs, as_json)
    emit({"status": "done", **record.model_dump(mode="json")}, as_json, lambda: _summary(record, out))


def preflight(
    base: Base,
    demonstrations: Demonstrations,
    method: MethodName = None,
    recipe: RecipeFile = None,
    settings: Setting = None,
    grader: GraderText = "exact",
    holdout_fraction: HoldoutFraction = DEFAULT_HOLDOUT_FRACTION,
    rehearsal: Rehearsal = None,
    parent: Parent = None,
    as_json: AsJson = False,
) -> None:
    """Check a file of demonstrations and say what training on it would take, without training.

    Exit status: 0 clean or with warnings only, 1 bad input, 2 it would be refused.
    """
    inputs = read_inputs(
        Options(
            base, demonstrations, method, recipe or [], settings or [], grader, holdout_fraction, rehearsal,
            parent, None,
        )
    )  # fmt: skip
    reports: list[PreflightReport] = []
    refusals: list[RefusedLine] = []

    def hear(line: TrainerLine) -> None:
        if isinstance(line, PreflightLine):
            reports.append(inputs.with_lines(line))
        elif isinstance(line, RefusedLine):
            refusals.append(line)

    with tempfile.TemporaryDirectory(prefix="ratchet-preflight-") as scratch:
        job_file = Path(scratch) / "job.json"
        job_file.write_text(inputs.job.model_dump_json(), encoding="utf-8")
        status = run_trainer(["--preflight", str(job_file)], Path(scratch) / "trainer.log", hear)
    if status == STOPPED:
        raise typer.Exit(EXIT_INTERRUPTED)
    report = reports[0] if reports else None
    emit(
        _as_json(report, refusals),
        as_json,
        lambda: render(report, inputs) if report is not None else f"refused: {refusals[0].message}",
    )
    if refusals:
        raise typer.Exit(EXIT_REFUSED)


def _train(output: OutputFolder, inputs: Inputs, as_json: bool) -> TrainingRecord:
    """Raises typer.Exit when it is refused or interrupted."""
    progress = ProgressLine(inputs.skill.name)
    refusals: list[RefusedLine] = []
    reports: list[PreflightLine] = []
    checkpoint = 0

    def hear(line: TrainerLine) -> None:
        nonlocal checkpoint
        line = output.keep(line)
        if isinstance(line, StepLine):
            progress.note({"type": "metrics", "level": "info", "data": line.model_dump(mode="json")})
            return
        if isinstance(line, RefusedLine):
            refusals.append(line)
            return
        if isinstance(line, FailedLine):
            raise CliError(f"{line.message} The same command goes on from the last checkpoint.")
        if isinstance(line, CheckpointLine):
            checkpoint = line.step
        # A line of its own for what is said once; checkpoints come and go with the steps.
        level = "info" if isinstance(line, CheckpointLine) and not line.resumed else "warning"
        progress.note({"type": "message", "level": level, "message": describe(line), "data": {}})
        if isinstance(line, PreflightLine):
            reports.append(line)
            for finding in line.findings:
                err.print(render_finding(finding))

    try:
        status = run_trainer([str(output.job_file)], output.log_file, hear)
    finally:
        progress.end_line()
    if status == REFUSED:
        report = reports[0] if reports else None
        if as_json:
            print(json.dumps(_as_json(report, refusals), ensure_ascii=False))
        # A report with errors has told them already.
        said = report is not None and report.errors
        err.print("refused: nothing was trained" if said else f"refused: {refusals[0].message}")
        raise typer.Exit(EXIT_REFUSED)
    if status == STOPPED:
        if as_json:
            print(json.dumps({"status": "interrupted", "checkpoint": checkpoint}))
        err.print(
            f"interrupted; the same command goes on from the checkpoint of step {checkpoint}"
            if checkpoint
            else "interrupted before the first checkpoint; the same command begins again"
        )
        raise typer.Exit(EXIT_INTERRUPTED)
    return output.seal()


def _as_json(report: PreflightReport | None, refusals: list[RefusedLine]) -> Json:
    refused: Json | None = None
    if refusals:
        refused = refusals[0].model_dump(mode="json", exclude={"type"})
        if report is not None and report.errors:
            refused["message"] = report.refusal()  # by lines, which the trainer does not know
    return {
        "status": "passed" if refused is None else "refused",
        "refused": refused,
        "preflight": None if report is None else report.model_dump(mode="json", exclude={"type"}),
    }


def _summary(record: TrainingRecord, out: Path) -> Table:
    last = record.metrics
    return fields(
        {
            "trained": str(out),
            "method": f"{record.recipe.method} on {record.base_model}",
            "demonstrations": f"{record.train} trained on, {record.holdout} held out",
            "steps": f"{record.steps} in {record.seconds:.0f} s",
            "last step": f"loss {last.loss:.4f}, {last.response_tokens:.1f} tokens a sample, "
            f"gradient norm {last.grad_norm:.3g}",
            "held out": None if record.early_stop is None else describe(record.early_stop),
            "before": record.preflight.summary(),
        },
        ("trained", "method", "demonstrations", "steps", "last step", "held out", "before"),
    )
