"""A whole study on a tiny model: stopped, resumed, skipped, reported."""

import contextlib
import io
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks import continual
from benchmarks.study import Study, StudySettings
from tests.unit.engine.conftest import start_server

STEPS = 4
RUNS = {
    "kept": {"role": "sdft", "changes": {"lora_rank": 2, "max_new_tokens": 4, "checkpoint_every": 2}},
    "lost": {
        "role": "sft",
        "changes": {"method": "sft", "lora_rank": 2, "rehearsal_share": 0, "checkpoint_every": 2},
    },
}


class Command:
    """`ratchet bench continual` on the tiny model, in this process."""

    def __init__(self, base: Path, data: Path, arms: Path) -> None:
        self._base, self._data, self._arms = base, data, arms

    def __call__(self, folder: Path, *more: str) -> dict[str, object]:
        """Returns the last line of standard output."""
        options = ["--out", folder, "--base", self._base, "--data", self._data, "--arms-file", self._arms]
        sizes = ["--skills", "sort,call", "--steps", STEPS, "--eval-rows", 4, "--general-items", 3]
        command = ["continual", *options, *sizes, "--pass-items", 1, "--json", *more]
        printed = io.StringIO()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
                patch.setattr(sys, "argv", [str(part) for part in command])
                continual.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        last: dict[str, object] = json.loads(printed.getvalue().splitlines()[-1])
        return last


@pytest.fixture(scope="module")
def command(base_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    arms = tmp_path_factory.mktemp("arms") / "arms.json"
    arms.write_text(json.dumps(RUNS))
    return Command(base_folder, data, arms)


@pytest.fixture(scope="module")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A study of both arms run to its end: its folder and its last line."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, command(folder)


def lines(folder: Path) -> list[tuple[str, int]]:
    found = [json.loads(text) for text in (folder / "results.jsonl").read_text().splitlines()]
    return [(line["arm"], line["stage"]) for line in found]


def weights(folder: Path, arm: str, stage: str) -> dict[str, list[float]]:
    file = folder / "lineages" / arm / "seed0" / stage / "version" / "adapter_model.safetensors"
    return {name: tensor.tolist() for name, tensor in load_file(file).items()}


def test_a_study_from_nothing_to_its_report(whole: tuple[Path, dict[str, object]]) -> None:
    folder, last = whole

    assert lines(folder) == [("base", 0), ("kept", 1), ("lost", 1), ("kept", 2), ("lost", 2)]
    arms = last["arms"]
    assert isinstance(arms, dict)
    for arm in ("kept", "lost"):
        assert arms[arm]["stages"] == 2
        for name in ("acc", "bwt", "forgetting", "general_drop", "new_skill_score", "kl_to_base"):
            assert isinstance(arms[arm][name], float), name
        assert arms[arm]["kl_to_base"] > 0
    versus = last["sdft_vs_sft"]
    assert isinstance(versus, dict)
    assert (versus["arm"], versus["against"]) == ("kept", "lost")
    for name in ("forgetting_ratio", "general_drop_ratio", "likelihood_drop_ratio", "new_skill_difference"):
        assert set(versus[name]) == {"value", "low", "high"}
    report = (folder / "report.md").read_text()
    assert "| kept | 2 | 1 |" in report
    for plot in ("accuracy.svg", "forgetting.svg"):
        assert plot in report
        assert "</svg>" in (folder / plot).read_text()


def test_the_second_stage_continues_the_first_and_knows_its_figures(
    whole: tuple[Path, dict[str, object]],
) -> None:
    folder, _ = whole
    result = json.loads((folder / "results.jsonl").read_text().splitlines()[-1])

    assert weights(folder, "lost", "2-call") != weights(folder, "lost", "1-sort")
    assert result["training"]["steps"] == STEPS
    assert set(result["skills"]["sort"]) == {"sort-eval-0", "sort-eval-1", "sort-eval-3", "sort-eval-4"}
    assert set(result["general"]) == {"arc_easy", "hellaswag", "lambada_openai", "piqa", "likelihood"}
    assert {skill: len(counts) for skill, counts in result["passes"].items()} == {"sort": 1, "call": 1}
    assert set(result["dev"]) == {"call-dev-32", "call-dev-33"}
    assert len(result["kl_to_base"]) == len(result["ordinary"]) == 30


def test_what_is_finished_is_not_done_again(
    command: Command, whole: tuple[Path, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between training and measuring: the version is there, its line is not."""
    folder = tmp_path / "study"
    shutil.copytree(whole[0], folder)
    before = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(before[:-1]))

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("benchmarks.teaching.train", refuse)
    assert command(folder) == whole[1]
    again, first = (
        [{**json.loads(text), "seconds": None} for text in some]
        for some in ((folder / "results.jsonl").read_text().splitlines(), before)
    )
    assert again == first


def test_a_stopped_study_ends_as_an_unstopped_one(
    command: Command, whole: tuple[Path, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    stage = folder / "lineages" / "kept" / "seed0" / "1-sort"

    class StopsAfterThreeSteps(continual.Stop):
        def __call__(self) -> bool:
            steps = stage / "steps.jsonl"
            return steps.exists() and len(steps.read_text().splitlines()) == 3

    with monkeypatch.context() as patched:
        patched.setattr(continual, "Stop", StopsAfterThreeSteps)
        last = command(folder, "--arms", "kept", "--stages", "1")
    assert last["arms"] == {}
    assert not (stage / "version").exists()
    command(folder, "--arms", "kept", "--stages", "1")

    assert weights(folder, "kept", "1-sort") == weights(whole[0], "kept", "1-sort")
    assert not (stage / "checkpoints").exists()


def test_a_refused_arm_does_not_stop_the_others(command: Command, tmp_path: Path) -> None:
    """4096 tokens for an answer don't fit the tiny model's window of 512."""
    folder, arms = tmp_path / "study", tmp_path / "arms.json"
    arms.write_text(json.dumps({"long": {"role": "sdft", "changes": {"max_new_tokens": 4096}}, **RUNS}))

    with pytest.raises(SystemExit, match=r"refused:\nlong, seed 0, stage 1 \(sort\): .*512"):
        command(folder, "--arms-file", str(arms), "--arms", "long,lost", "--stages", "1")
    assert lines(folder) == [("base", 0), ("lost", 1)]
    assert (folder / "report.md").exists()


def test_a_servers_rollouts_beside_the_trainers_own(
    command: Command, base_folder: Path, tmp_path: Path
) -> None:
    """The same recipe twice; only the server's answers come with log-probabilities to compare."""
    folder, arms = tmp_path / "study", tmp_path / "arms.json"
    arms.write_text(json.dumps({"here": RUNS["kept"], "there": {**RUNS["kept"], "rollouts": "server"}}))
    more = ["--arms-file", str(arms), "--stages", "1"]
    with pytest.raises(SystemExit, match="arm 'there' needs --rollout-url"):
        command(folder, *more)

    server = start_server(base_folder)
    try:
        command(folder, *more, "--rollout-url", server.url)
    finally:
        server.stop()
    assert lines(folder) == [("base", 0), ("here", 1), ("there", 1)]
    gaps = {
        arm: [json.loads(line)["rollout_gap"] for line in steps.read_text().splitlines()]
        for arm in ("here", "there")
        for steps in [folder / "lineages" / arm / "seed0" / "1-sort" / "steps.jsonl"]
    }
    assert gaps["here"] == [None] * STEPS
    rounds = [gap for gap in gaps["there"] if gap is not None]  # told with the first step of a round
    assert rounds
    assert max(rounds) < 0.1


def test_no_budget_only_reports(command: Command, tmp_path: Path) -> None:
    last = command(tmp_path / "study", "--budget-minutes", "0")

    assert last == {"arms": {}, "sdft_vs_sft": None, "comparisons": {}}
    assert not (tmp_path / "study" / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "unknown"], "no arm unknown"),
        (["--skills", "sort,none"], "none.train.jsonl"),
        (["--base", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_named(command: Command, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        command(tmp_path / "study", *more)


def test_settings_of_a_study_do_not_change(command: Command, tmp_path: Path) -> None:
    settings = StudySettings(
        base_model="other", skills=["sort"], steps=1, eval_rows=1, general_items=1, pass_items=1
    )
    Study(tmp_path / "study", settings)

    with pytest.raises(SystemExit, match="has base_model other"):
        command(tmp_path / "study")
