"""What a demo showed: filled while it runs, printed as a table, written as JSON."""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.background import BackgroundChat
from cli.client import Json
from cli.output import SCORE_COLOURS, table
from evaluation.benchmarks import LIKELIHOOD, ORDINARY

NO_BENCHMARKS = {
    ORDINARY: "ordinary prompts not in a skill's format",
    LIKELIHOOD: "likelihood of right answers",
}
"""General suites that are shown, but are no accuracies to average."""


@dataclass(frozen=True)
class Answer:
    """What the served assistant said to one held-out prompt at one moment."""

    skill: str
    prompt: str
    expected: str
    moment: str
    version: str | None
    text: str


@dataclass
class Report:
    """Moments are `base`, `after_1`, `after_2` ... and `after_rollback`."""

    skills: list[str]
    assistant: str = ""
    url: str = ""
    moments: dict[str, str] = field(default_factory=dict)
    """Moment -> the version that served then, in order."""
    matrix: Json = field(default_factory=lambda: {"scores": {}, "general": {}})
    evals: dict[str, dict[str, float]] = field(default_factory=dict)
    """Name -> moment -> share of right answers through the gateway."""
    eval_rows: dict[str, int] = field(default_factory=dict)
    stage_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    swaps: list[Json] = field(default_factory=list)
    """{version, seconds}: from the alias's move until that version answers."""
    rollback: Json | None = None
    """{from_version, to_version, seconds}: from the request until the earlier version answers."""
    answers: list[Answer] = field(default_factory=list)
    requests: int = 0
    failures: list[str] = field(default_factory=list)
    replies_per_version: dict[str, int] = field(default_factory=dict)
    slowest_request_seconds: float = 0.0
    wall_seconds: float = 0.0
    error: str | None = None

    def note_chat(self, chat: BackgroundChat) -> None:
        self.requests = sum(chat.replies.values()) + len(chat.failures)
        self.failures = chat.failures
        self.replies_per_version = dict(sorted(chat.replies.items()))
        self.slowest_request_seconds = chat.slowest_seconds

    @property
    def taught_moments(self) -> dict[str, str]:
        return {moment: version for moment, version in self.moments.items() if moment != "after_rollback"}

    def cells(self, kind: str, suite: str) -> dict[str, Json | None]:
        """Moment -> the matrix's cell; None where unmeasured."""
        row = self.matrix[kind].get(suite, {})
        return {moment: row.get(version) for moment, version in self.taught_moments.items()}

    def skill_scores(self) -> dict[str, dict[str, float | None]]:
        return {skill: _scores(self.cells("scores", skill)) for skill in self.skills}

    def general_scores(self) -> dict[str, float | None]:
        """Plain mean over the general benchmarks; None at a moment where one is unmeasured."""
        rows = [
            _scores(self.cells("general", suite))
            for suite in self.matrix["general"]
            if suite not in NO_BENCHMARKS
        ]
        return {moment: _mean([row[moment] for row in rows]) for moment in self.taught_moments}

    def as_json(self) -> Json:
        general = self.matrix["general"]
        return {
            "skills": self.skill_scores(),
            "general": self.general_scores(),
            "benchmarks": {suite: _scores(self.cells("general", suite)) for suite in general},
            "eval": self.evals,
            "eval_rows": self.eval_rows,
            "versions": list(dict.fromkeys(self.moments.values())),
            "moments": self.moments,
            "swap_seconds": max((swap["seconds"] for swap in self.swaps), default=None),
            "swaps": self.swaps,
            "rollback_seconds": self.rollback["seconds"] if self.rollback else None,
            "rollback": self.rollback,
            "stage_seconds": self.stage_seconds,
            "answers": [vars(answer) for answer in self.answers],
            "requests": self.requests,
            "failed_requests": len(self.failures),
            "failures": self.failures,
            "replies_per_version": self.replies_per_version,
            "slowest_request_seconds": round(self.slowest_request_seconds, 2),
            "wall_seconds": round(self.wall_seconds, 1),
            "error": self.error,
        }

    def print_to(self, console: Console) -> None:
        for part in (self.score_table(), self.stage_table(), self.answer_table()):
            if part.row_count:
                console.print(part)
                console.print()
        for line in self.closing_lines():
            console.print(line)

    def score_table(self) -> Table:
        moments = list(self.moments)
        rows: list[list[str | Text]] = []
        for skill in self.skills:
            rows.append([f"skill {skill}", *_row(_scores(self.cells("scores", skill)), moments)])
        for suite in self.matrix["general"]:
            rows.append(
                [
                    f"general {NO_BENCHMARKS.get(suite, suite)}",
                    *_row(_scores(self.cells("general", suite)), moments),
                ]
            )
        rows.append(["general, mean", *_row(self.general_scores(), moments)])
        for name, scores in self.evals.items():
            rows.append([f"held-out file {name} ({self.eval_rows[name]})", *_row(scores, moments)])
        heads = [f"{moment.replace('_', ' ')} ({version})" for moment, version in self.moments.items()]
        return table(
            ["accuracy", *heads], rows if moments else [], title="What was learned and what was kept"
        )

    def stage_table(self) -> Table:
        stages = list(dict.fromkeys(stage for seconds in self.stage_seconds.values() for stage in seconds))
        rows: list[list[str]] = [
            [name, *(f"{seconds[stage]:.1f}" if stage in seconds else "" for stage in stages)]
            for name, seconds in self.stage_seconds.items()
        ]
        return table(["seconds", *stages], rows)

    def answer_table(self) -> Table:
        rows: list[list[str | Text]] = []
        for answer in sorted(self.answers, key=lambda one: self.skills.index(one.skill)):
            moment = f"{answer.moment.replace('_', ' ')} ({answer.version})"
            rows.append([answer.skill, moment, Text(shorten(answer.text)), Text(answer.expected)])
        return table(["prompt of", "moment", "the served assistant says", "expected"], rows)

    def closing_lines(self) -> list[str]:
        lines = [f"swap to {swap['version']}: {swap['seconds']:.2f} s" for swap in self.swaps]
        if self.rollback is not None:
            rollback = self.rollback
            lines.append(
                f"rolled back from {rollback['from_version']} to {rollback['to_version']} in "
                f"{rollback['seconds']:.2f} s, and {rollback['to_version']} answers again"
            )
        versions = ", ".join(f"{version} {count}" for version, count in self.replies_per_version.items())
        lines.append(
            f"background client: {self.requests} requests, {len(self.failures)} failed, "
            f"slowest {self.slowest_request_seconds:.1f} s; answered by {versions or 'none'}"
        )
        lines.append(f"whole run: {self.wall_seconds:.0f} s")
        return lines


def shorten(text: str, limit: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _scores(cells: dict[str, Json | None]) -> dict[str, float | None]:
    return {moment: cell["score"] if cell is not None else None for moment, cell in cells.items()}


def _mean(scores: list[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


def _row(scores: dict[str, float | None] | dict[str, float], moments: list[str]) -> list[Text]:
    return [_cell(scores.get(moment)) for moment in moments]


def _cell(score: float | None) -> Text:
    if score is None:
        return Text("-", style="dim")
    colour = next((colour for least, colour in SCORE_COLOURS if score >= least), "red")
    return Text(f"{score:.3f}", style=colour)
