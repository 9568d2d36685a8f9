"""What `ratchet train` reads before any trainer starts, what its folder keeps, and what people are told."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from cli.errors import CliError
from cli.main import app
from cli.preflight_report import render
from cli.training_inputs import Inputs, Options, read_inputs
from cli.training_output import OutputFolder
from domain.demonstration import is_held_out, parse_jsonl
from domain.preflight import Cost, Finding, FindingCode, Place, PreflightReport
from domain.recipe import Method
from domain.training import CheckpointLine, DoneLine, PreflightLine, StepLine, TrainerLine, TrainingJob


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """As much of a model as is looked at: two weights."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 128}))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return folder


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "route.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def options(base: Path, file: Path, **changes: Any) -> Options:
    given: dict[str, Any] = {
        "base": str(base), "demonstrations": file, "method": None, "recipe": [], "settings": [],
        "grader": "exact", "holdout_fraction": 0.3, "rehearsal": None, "parent": None,
        "rollout_url": None,
    }  # fmt: skip
    return Options(**(given | changes))


@pytest.fixture
def inputs(base: Path, tmp_path: Path) -> Inputs:
    rows = [{"prompt": f"p{n}", "response": "r"} for n in range(30)]
    return read_inputs(options(base, write(tmp_path, *rows, rows[4], rows[7])))


def test_the_split_is_the_registrys_and_repeated_lines_count_once(inputs: Inputs) -> None:
    numbered = parse_jsonl(inputs.file.read_bytes())[:30]
    expected: dict[str, list[int]] = {"train": [], "holdout": []}
    for line, demonstration in numbered:
        expected["holdout" if is_held_out(demonstration.prompt_hash(), 0.3) else "train"].append(line)
    assert inputs.lines == expected
    assert min(len(lines) for lines in inputs.lines.values()) > 3
    taught = [one.messages[0].content for one in inputs.skill.train]
    assert taught == [f"p{line - 1}" for line in expected["train"]]
    assert [(line, like) for line, like, _ in inputs.repeated] == [(31, 5), (32, 8)]
    assert inputs.skill.name == "route"


def test_a_small_base_gets_its_recipe_and_what_is_given_wins_in_order(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "p", "response": "r"})
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"learning_rate": 0.5, "batch_size": 7, "method": "sdft"}))
    given = options(
        base, file, recipe=[str(recipe)], settings=["batch_size=9"], method="sft", holdout_fraction=0.0
    )
    job = read_inputs(given).job
    assert (job.recipe.method, job.recipe.learning_rate, job.recipe.batch_size) == ("sft", 0.5, 9)
    assert job.recipe.max_new_tokens == 32  # of the small model's recipe; the paper's has 1024
    assert (job.base_model, job.base_path, job.parent_adapter_path) == (str(base), str(base), None)
    assert len(job.rehearsal) > 200


def test_rehearsal_prompts_may_come_from_an_earlier_skills_file(base: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.jsonl"
    earlier.write_text('{"prompt": "old", "response": "x"}\n')
    file = write(tmp_path, {"prompt": "p", "response": "r"})
    job = read_inputs(options(base, file, rehearsal=earlier, holdout_fraction=0.0)).job
    assert [[m.content for m in messages] for messages in job.rehearsal] == [["old"]]


def test_another_parent_is_another_training(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "p", "response": "r"})

    def fingerprint(parent: Path | None) -> str:
        return read_inputs(options(base, file, parent=parent, holdout_fraction=0.0)).job.fingerprint()

    parents = [tmp_path / "one", tmp_path / "two"]
    for folder in parents:
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
    assert len({fingerprint(None), *map(fingerprint, parents)}) == 3
    assert fingerprint(parents[0]) == fingerprint(parents[0])


def test_where_the_rollout_server_is_does_not_matter_but_that_there_is_one_does(
    base: Path, tmp_path: Path
) -> None:
    file = write(tmp_path, {"prompt": "p", "response": "r"})

    def job(url: str | None) -> TrainingJob:
        return read_inputs(options(base, file, rollout_url=url, holdout_fraction=0.0)).job

    assert job("http://127.0.0.1:8000").rollout_url == "http://127.0.0.1:8000"
    prints = [job(url).fingerprint() for url in (None, "http://127.0.0.1:8000", "http://127.0.0.1:8001")]
    assert prints[1] == prints[2] != prints[0]
    with pytest.raises(CliError, match=r"--rollout-url '127.0.0.1:8000' is not a URL"):
        job("127.0.0.1:8000")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "learning_rate=-1"], "recipe.learning_rate: Input should be greater than 0"),
        (["--set", "learning_rat=1"], "recipe.learning_rat: Extra inputs are not permitted"),
        (["--grader", "magic"], "--grader: Input tag 'magic'"),
        (["--parent", "/nowhere"], "--parent /nowhere holds no trained model"),
        (["--base", "/nowhere"], "there is no folder /nowhere"),
        (["--recipe", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["--holdout-fraction", "2"], "--holdout-fraction"),
        (["--method", "magic"], "magic"),
        (["--nonsense"], "No such option"),
    ],
)
def test_bad_input_is_named_and_exits_with_1(
    base: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    file = write(tmp_path, {"prompt": "p", "response": "r"})
    common = ["--base", str(base), "--demonstrations", str(file)]
    for command in (["train", "--out", str(tmp_path / "out")], ["preflight"]):
        result = CliRunner().invoke(app, [*command, *common, *arguments])
        assert result.exit_code == 1
        assert told in result.stderr.replace("\n", " ").replace("│", "").replace("  ", " ")
    assert not (tmp_path / "out").exists()


def test_every_bad_line_is_named(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "p", "response": "r"}\n{"prompt": "p"}\noops\n')
    arguments = ["preflight", "--base", str(base), "--demonstrations", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    told = result.stderr.splitlines()
    assert told[0] == f"error: {file}: line 2: response: Field required"
    assert told[1].startswith(f"{file}: line 3: not valid JSON")


def test_a_file_of_held_out_prompts_alone_cannot_be_trained_on(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "response": "r"} for n in range(40)]
    held = [
        row for row in rows if is_held_out(parse_jsonl(json.dumps(row).encode())[0][1].prompt_hash(), 0.3)
    ]
    with pytest.raises(CliError, match="held out: lower"):
        read_inputs(options(base, write(tmp_path, *held)))


def test_places_are_named_by_lines(inputs: Inputs) -> None:
    train, held = inputs.lines["train"], inputs.lines["holdout"]
    conflict = Finding(
        code="label_conflict",
        severity="warning",
        message="m",
        why="w",
        mend="d",
        param="demonstrations",
        places=[
            Place(skill="route", split="train", number=3, detail="x", like=2),
            Place(skill="route", split="holdout", number=1, detail="y"),
            Place(skill=None, split="rehearsal", number=1, detail="z"),
        ],
    )
    report = PreflightReport(
        items=0, student_score=None, teacher_score=None, gap=None, longest_prompt_tokens=1, steps=1,
        findings=[conflict],
    )  # fmt: skip
    named, repeated = inputs.with_lines(report).findings
    assert [(place.line, place.like) for place in named.places] == [
        (train[2], train[1]),
        (held[0], None),
        (None, None),
    ]
    assert [place.name() for place in repeated.places] == ["line 31", "line 32"]
    assert repeated.severity == "warning"


def line(step: int, loss: float = 1.0) -> StepLine:
    figures = {name: 0.0 for name, field in StepLine.model_fields.items() if field.is_required()}
    return StepLine.model_validate({**figures, "step": step, "steps": 9, "loss": loss})


def report_line() -> PreflightLine:
    return PreflightLine(
        items=0, student_score=None, teacher_score=None, gap=None, longest_prompt_tokens=1, steps=9
    )


def test_a_part_that_is_trained_again_replaces_what_it_wrote(inputs: Inputs, tmp_path: Path) -> None:
    """Killed after step 3 with a checkpoint of step 2 and a torn last line; then begun anew."""
    output = OutputFolder(tmp_path / "out", None, inputs)

    def kept() -> list[tuple[str, object]]:
        return [(one.type, getattr(one, "step", None)) for one in output.lines()]

    heard: list[TrainerLine] = [report_line(), line(1), line(2), CheckpointLine(step=2), line(3)]
    with output.opened():
        for one in heard:
            output.keep(one)
    with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
        file.write('{"type": "st')
    with output.opened():
        output.keep(CheckpointLine(step=2, resumed=True))
        output.keep(line(3, loss=0.5))
    assert kept() == [
        ("preflight", None), ("step", 1), ("step", 2), ("checkpoint", 2), ("checkpoint", 2), ("step", 3),
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])["loss"] == 0.5
    with output.opened():
        output.keep(report_line())
    assert kept() == [("preflight", None)]


def test_a_sealed_folder_holds_the_model_and_its_record_alone(inputs: Inputs, tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out", None, inputs)
    with output.opened():
        (tmp_path / "out" / "checkpoints" / "step-000002").mkdir(parents=True)
        partial = Path(output.job.output_dir)
        partial.mkdir()
        (partial / "adapter_model.safetensors").write_bytes(b"weights")
        output.log_file.write_text("log")
        heard: list[TrainerLine] = [report_line(), line(1), line(2, loss=0.25), DoneLine(steps=2, seconds=3)]
        for one in heard:
            output.keep(one)
        record = output.seal()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_model.safetensors",
        "metrics.jsonl",
        "training.json",
    ]
    assert (record.steps, record.seconds, record.metrics.loss) == (2, 3.0, 0.25)
    assert (record.train, record.holdout) == tuple(len(lines) for lines in inputs.lines.values())
    assert output.finished() == record


def test_a_folder_with_anything_else_in_it_is_left_alone(inputs: Inputs, base: Path) -> None:
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    with (
        pytest.raises(CliError, match="holds files of something else"),
        OutputFolder(base, None, inputs).opened(),
    ):
        pass
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_two_trainings_cannot_share_a_folder_at_once(inputs: Inputs, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with (
        OutputFolder(folder, None, inputs).opened(),
        pytest.raises(CliError, match="in use by another"),
        OutputFolder(folder, None, inputs).opened(),
    ):
        pass


def told(report: PreflightReport, inputs: Inputs) -> str:
    console = Console(width=140, record=True, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(render(report, inputs))
    return capture.get()


def test_the_report_says_what_where_why_and_how_to_mend(inputs: Inputs) -> None:
    bad = Finding(
        code="control_token",
        severity="error",
        message="2 demonstrations contain control tokens of the base model.",
        why="It ends a turn.",
        mend="Remove it.",
        param="demonstrations",
        places=[
            Place(skill="route", split="train", number=n, line=n, detail=f"“p{n}” has <s>") for n in range(25)
        ],
    )
    report = PreflightReport(
        items=0, student_score=None, teacher_score=None, gap=None, longest_prompt_tokens=70, steps=94,
        findings=[bad],
    )  # fmt: skip
    text = told(report, inputs)
    assert "error: 2 demonstrations contain control tokens of the base model." in text
    assert "  line 3: “p3” has <s>\n" in text
    assert "and 5 more; --json lists all" in text
    assert "why:  It ends a turn." in text
    assert "mend: Remove it." in text
    assert "It would be refused." in text
    assert "Greedy answers" not in text


def test_the_report_gives_scores_lengths_and_cost(inputs: Inputs) -> None:
    cost = Cost(
        seconds=7300, rollout_seconds=60, teacher_seconds=240, student_seconds=7000, probe_seconds=9,
        parameter_bytes=270_000_000, peak_bytes=1_500_000_000, available_bytes=4_000_000_000, device="cpu",
    )  # fmt: skip
    report = PreflightReport(
        items=20, student_score=0.0, teacher_score=1.0, gap=1.0, gap_low=0.73, gap_high=1.0,
        student_tokens=28.9, teacher_tokens=6.6, student_truncated=0.65, teacher_truncated=0.0,
        longest_prompt_tokens=70, steps=94, cost=cost,
    )  # fmt: skip
    text = told(report, inputs)
    assert "gap +1.00, 95% interval [+0.73, +1.00]" in text
    assert "28.9" in text
    assert "65%" in text
    assert "2.0 h of training on cpu (rollouts 60 s, teacher 4 min, student 117 min)" in text
    assert "at most 1.50 GB of memory (0.27 GB of it weights; 4.00 GB can be had)" in " ".join(text.split())
    assert "Clean." in text
    blind = report.model_copy(update={"items": 0, "student_score": None, "cost": None})
    assert "Greedy answers" not in told(blind, inputs)


def test_the_page_names_every_option_finding_and_method() -> None:
    page = (Path(__file__).parents[3] / "docs" / "train.md").read_text()
    rows = re.findall(r"^\| (`[^|]+`) \|", page, re.M)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    commands = [group.commands["train"], group.commands["preflight"]]
    options = {name for one in commands for option in one.params for name in option.opts}
    assert options - {"--out"} == {name for name in named if name.startswith("--")}
    assert set(get_args(FindingCode)) <= named
    assert all(f"`{method}`" in page for method in get_args(Method))
