"""What preflight found, for people: what, where, why it matters, how to mend it."""

from rich.console import Group, RenderableType
from rich.text import Text

from cli.output import table
from cli.training_inputs import Inputs
from domain.preflight import Cost, Finding, Place, PreflightReport

PLACES_SHOWN = 20
COLOURS = {"error": "red", "warning": "yellow"}


def render(report: PreflightReport, inputs: Inputs) -> RenderableType:
    """The whole report: findings, scores of student and teacher, expected time and memory."""
    parts: list[RenderableType] = [_title(report, inputs)]
    parts += [render_finding(finding) for finding in report.findings]
    if report.items:
        parts.append(_answers(report))
    if report.cost is not None:
        parts.append(_cost(report.cost))
    parts.append(_verdict(report))
    return Group(*parts)


def render_finding(finding: Finding) -> Text:
    """`error: what`, then a line for each place, why, and how to mend."""
    text = Text.assemble((finding.severity, f"bold {COLOURS[finding.severity]}"), f": {finding.message}\n")
    for place in finding.places[:PLACES_SHOWN]:
        text.append(f"  {_where(place)}\n")
    if len(finding.places) > PLACES_SHOWN:
        text.append(f"  and {len(finding.places) - PLACES_SHOWN} more; --json lists all\n")
    text.append(f"  why:  {finding.why}\n", style="dim")
    return text.append(f"  mend: {finding.mend}\n")


def _where(place: Place) -> str:
    told = f"{place.name()}: {place.detail}"
    if place.like is None:
        return told
    return f"{told} (see {'line' if place.line is not None else 'number'} {place.like})"


def _title(report: PreflightReport, inputs: Inputs) -> str:
    skill, recipe = inputs.skill, inputs.job.recipe
    return (
        f"{inputs.file}: {len(skill.train)} demonstrations to train on, {len(skill.holdout)} held out; "
        f"{report.steps} steps of {recipe.method} on {inputs.job.base_model}, longest prompt "
        f"{report.longest_prompt_tokens} tokens\n"
    )


def _answers(report: PreflightReport) -> Group:
    """Scores and lengths of the greedy answers to the held-out items."""
    rows = [
        _row("student", report.student_score, report.student_tokens, report.student_truncated),
        _row("teacher", report.teacher_score, report.teacher_tokens, report.teacher_truncated),
    ]
    title = f"Greedy answers to {report.items} held-out items"
    if report.gap is not None and report.gap_low is not None and report.gap_high is not None:
        title += f"; gap {report.gap:+.2f}, 95% interval [{report.gap_low:+.2f}, {report.gap_high:+.2f}]"
    return Group(title, table(["", "score", "mean tokens", "cut at max_new_tokens"], rows))


def _row(who: str, score: float | None, tokens: float | None, truncated: float | None) -> tuple[str, ...]:
    return (
        who,
        "-" if score is None else f"{score:.2f}",
        "-" if tokens is None else f"{tokens:.1f}",
        "-" if truncated is None else f"{truncated:.0%}",
    )


def _cost(cost: Cost) -> str:
    return (
        f"\nExpected: {_duration(cost.seconds)} of training on {cost.device} (rollouts "
        f"{_duration(cost.rollout_seconds)}, teacher {_duration(cost.teacher_seconds)}, student "
        f"{_duration(cost.student_seconds)}), at most {_size(cost.peak_bytes)} of memory "
        f"({_size(cost.parameter_bytes)} of it weights; {_size(cost.available_bytes)} can be had). "
        f"Measured in {cost.probe_seconds:.0f} s."
    )


def _verdict(report: PreflightReport) -> Text:
    if report.errors:
        return Text("\nIt would be refused.", style="bold red")
    count = len(report.warnings)
    said = "Clean." if not count else f"It would train; {count} warning{'s' if count > 1 else ''}."
    return Text(f"\n{said}", style="bold green" if not count else "bold yellow")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
