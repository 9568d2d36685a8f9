import io
import json
from typing import Any

import pytest
from rich.console import Console

from cli.background import BackgroundChat
from cli.client import Client, Reply
from cli.demo_report import Answer, Report
from cli.errors import CliError
from cli.progress import ProgressLine
from cli.updates import require_passed
from cli.versions import matrix_table


def cell(score: float) -> dict[str, Any]:
    return {"score": score, "n": 24, "low": score / 2, "high": (1 + score) / 2}


@pytest.fixture
def report() -> Report:
    made = Report(skills=["route", "topic"], assistant="demo-1")
    made.moments = {"base": "v0", "after_1": "v1", "after_2": "v3", "after_rollback": "v1"}
    made.matrix = {
        "scores": {
            "route": {"v0": cell(0.0), "v1": cell(0.875), "v2": cell(0.1), "v3": cell(0.75)},
            "topic": {"v0": cell(0.0), "v1": None, "v3": cell(0.5)},
        },
        "general": {
            "commonsense": {"v0": cell(0.5), "v1": cell(0.5), "v3": cell(0.4)},
            "last_word": {"v0": cell(0.3), "v1": None, "v3": cell(0.2)},
            "ordinary": {"v0": cell(1.0), "v1": cell(1.0), "v3": cell(0.9)},
            "likelihood": {"v0": cell(0.6), "v1": cell(0.6), "v3": cell(0.6)},
        },
    }
    made.evals = {"route": {"base": 0.0, "after_1": 0.8, "after_2": 0.7, "after_rollback": 0.8}}
    made.eval_rows = {"route": 48}
    made.stage_seconds = {"update 1": {"training": 100.0, "evaluating": 20.5}}
    made.swaps = [{"version": "v1", "seconds": 0.4}, {"version": "v3", "seconds": 1.1}]
    made.rollback = {"from_version": "v3", "to_version": "v1", "seconds": 0.7}
    made.answers = [Answer("route", "p", "QUEUE: BUG", "base", "v0", "I am sorry\nto hear")]
    made.requests, made.replies_per_version, made.wall_seconds = 12, {"v0": 5, "v1": 7}, 321.04
    return made


def test_json_has_the_agreed_keys_and_nulls_where_unmeasured(report: Report) -> None:
    written = json.loads(json.dumps(report.as_json()))
    assert written["skills"] == {
        "route": {"base": 0.0, "after_1": 0.875, "after_2": 0.75},
        "topic": {"base": 0.0, "after_1": None, "after_2": 0.5},
    }
    # The mean over benchmarks leaves out what is no accuracy and is unknown where one of them is.
    assert written["general"] == {"base": 0.4, "after_1": None, "after_2": pytest.approx(0.3)}
    assert written["benchmarks"]["ordinary"] == {"base": 1.0, "after_1": 1.0, "after_2": 0.9}
    assert written["versions"] == ["v0", "v1", "v3"]
    assert written["swap_seconds"] == 1.1
    assert written["rollback_seconds"] == 0.7
    assert written["failed_requests"] == 0
    assert written["wall_seconds"] == 321.0
    assert written["eval"]["route"]["after_rollback"] == 0.8


def test_the_table_shows_scores_stages_answers_and_the_rollback(report: Report) -> None:
    console = Console(file=io.StringIO(), width=140)
    report.print_to(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert lines["skill route"][-4:] == ["0.000", "0.875", "0.750", "-"]
    assert lines["skill topic"][-4:] == ["0.000", "-", "0.500", "-"]
    assert lines["held-out file route (48)"][-4:] == ["0.000", "0.800", "0.700", "0.800"]
    assert lines["update 1"][-2:] == ["100.0", "20.5"]
    assert "after rollback (v1)" in text
    assert "I am sorry to hear" in text
    assert "rolled back from v3 to v1 in 0.70 s, and v1 answers again" in text
    assert "background client: 12 requests, 0 failed" in text


def test_a_report_of_nothing_still_prints() -> None:
    console = Console(file=io.StringIO(), width=100)
    Report(skills=["route"]).print_to(console)
    assert "background client: 0 requests" in console.file.getvalue()  # type: ignore[attr-defined]


class Answering(Client):
    """Answers, or fails when the prompt is the marked one."""

    def __init__(self, fail_on: str) -> None:
        super().__init__("http://test")
        self.fail_on = fail_on

    def chat(self, model: str, messages: Any, **_: Any) -> Reply:
        if messages[0]["content"] == self.fail_on:
            raise CliError("the stream broke off before its end")
        return Reply("text", "v1")

    chat_streamed = chat


def test_the_background_client_counts_replies_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.background.PROMPTS", ("good", "bad", "fine"))
    chat = BackgroundChat(Answering("bad"), "demo")
    for prompt, stream in (("good", False), ("bad", False), ("fine", True)):
        chat._ask(prompt, stream)
    report = Report(skills=[])
    report.note_chat(chat)
    assert (report.requests, report.replies_per_version) == (3, {"v1": 2})
    assert "'bad': the stream broke off" in report.failures[0]


def test_the_matrix_shows_intervals_and_a_dash_where_unmeasured() -> None:
    console = Console(file=io.StringIO(), width=140)
    found = {
        "versions": [{"version": "v0"}, {"version": "v1"}],
        "scores": {"route": {"v0": None, "v1": {"score": 0.875, "n": 24, "low": 0.69, "high": 0.957}}},
        "general": {"commonsense": {"v0": cell(0.5), "v1": None}},
    }
    console.print(matrix_table(found))
    heads, route, general = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert heads.split() == ["skill", "v0", "v1"]
    assert route.split() == ["route", "-", "0.88", "[0.69,", "0.96]", "n=24"]
    assert general.split()[:3] == ["general:", "commonsense", "0.50"]


def event(kind: str, message: str = "", **data: Any) -> dict[str, Any]:
    return {"type": kind, "message": message, "level": "info", "data": data}


def test_progress_off_a_terminal_keeps_phases_and_thins_out_steps() -> None:
    stream = io.StringIO()
    progress = ProgressLine("update 1/2", stream)
    steps = [
        event("metrics", step=step, steps=9, loss=0.51234, rehearsal_kl=None, eta_seconds=90.0)
        for step in (1, 2, 3)
    ]
    progress.follow(
        [
            event("phase", phase="training"),
            *steps,
            event("verdict", "pass"),
            event("message", "Serving after 0.4 s.", swap_seconds=0.4),
            event("message", "Stages", stage_seconds={"training": 7.5}),
        ]
    )
    assert stream.getvalue().splitlines() == ["update 1/2: training", "update 1/2: pass"]
    assert (progress.swap_seconds, progress.stage_seconds) == (0.4, {"training": 7.5})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_rewrites_one_line() -> None:
    stream = Terminal()
    ProgressLine("u", stream).follow(
        [
            event("message", "long first message"),
            event("metrics", step=3, steps=9, loss=0.51234, rehearsal_kl=0.012, eta_seconds=90.4),
        ]
    )
    assert stream.getvalue() == (
        "\ru: long first message\ru: training step 3/9, loss 0.512, rehearsal KL 0.012, 90 s to go\n"
    )


@pytest.mark.parametrize(
    ("update", "told"),
    [
        ({"status": "failed", "error": {"message": "Too long."}}, "update u failed: Too long."),
        ({"status": "cancelled"}, "update u is cancelled"),
        (
            {"status": "succeeded", "verdict": {"outcome": "block", "reasons": ["a fell", "b fell"]}},
            "the gate said block to u: a fell; b fell",
        ),
    ],
)
def test_an_update_that_made_nothing_to_serve_says_why(update: dict[str, Any], told: str) -> None:
    with pytest.raises(CliError) as error:
        require_passed({"id": "u"} | update)
    assert str(error.value) == told
