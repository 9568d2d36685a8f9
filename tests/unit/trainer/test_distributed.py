"""Two processes on gloo train as one does: data parallel and sharded, adapters and full."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from domain.demonstration import Message
from domain.skill import ExactGrader
from domain.training import (
    TRAINER_LINE,
    CheckpointLine,
    DoneLine,
    PreflightLine,
    SkillToTeach,
    StepLine,
    TrainerLine,
    TrainingJob,
)
from tests.unit.trainer.builders import demonstration
from tests.unit.trainer.conftest import RECIPE
from tests.unit.trainer.together import Planned, launch
from trainer import distributed
from trainer.run import Interrupted, train

pytestmark = pytest.mark.timeout(1600)

ROOT = Path(__file__).parents[3]
STEPS = 6
CASES: dict[str, dict[str, Any]] = {
    "adapter": {"teacher": "ema"},
    "adapter, frozen teacher": {"teacher": "parent", "num_context_demonstrations": 2},
    "full": {"lora_rank": 0, "learning_rate": 1e-3, "teacher": "ema"},
    "full, frozen teacher": {"lora_rank": 0, "learning_rate": 1e-3, "teacher": "parent"},
}
LAYOUTS = {"replicated": False, "sharded": True}
CUT = {"adapter": False, "full": True}
"""Interrupted by two processes and finished by one; sharded or not."""


def weights(job: TrainingJob) -> dict[str, torch.Tensor]:
    (file,) = Path(job.output_dir).glob("*.safetensors")
    return load_file(file)


def steps(lines: list[TrainerLine]) -> list[StepLine]:
    return [line for line in lines if isinstance(line, StepLine)]


def alone(job: TrainingJob, stop_after: int | None = None) -> list[TrainerLine]:
    lines: list[TrainerLine] = []
    train(job, lines.append, lambda: len(steps(lines)) == stop_after)
    return lines


class Outcomes:
    """One launch of two processes runs every case: starting them takes longer than the training."""

    def __init__(self, folder: Path, base: Path) -> None:
        self._folder = folder
        self._base = base
        self.single = {name: alone(self.job("one", name)) for name in CASES}
        with pytest.raises(Interrupted):
            alone(self.job("from one", "full"), stop_after=3)
        planned = [
            self._plan(layout, name, sharded=sharded) for name in CASES for layout, sharded in LAYOUTS.items()
        ]
        planned += [self._plan("cut", name, sharded=sharded, stop_after=3) for name, sharded in CUT.items()]
        planned.append(self._plan("from one", "full", sharded=True))
        launch(planned, self._folder / "plan.json")

    def job(self, layout: str, name: str) -> TrainingJob:
        skill = SkillToTeach(
            name="sort",
            grader=ExactGrader(),
            # Lengths differ, so that the processes' forward passes do too.
            train=[demonstration(f"item {i}" * (1 + i), "AB"[i % 2] * (1 + i)) for i in range(8)],
            holdout=[demonstration(f"held {i}", "AB"[i % 2] * 3) for i in range(3)],
        )
        return TrainingJob(
            update_id="up_1",
            base_path=str(self._base),
            base_model="tiny",
            parent_adapter_path=None,
            recipe=RECIPE.model_copy(update={**CASES[name], "max_steps": STEPS, "max_new_tokens": 9}),
            skills=[skill],
            rehearsal=[[Message(role="user", content=text)] for text in ("hello", "what is this?", "bye")],
            checkpoint_dir=str(self._folder / layout / name / "checkpoints"),
            output_dir=str(self._folder / layout / name / "out"),
        )

    def lines(self, layout: str, name: str, rank: int) -> list[TrainerLine]:
        path = self._folder / layout / f"{name}.{rank}"
        return [TRAINER_LINE.validate_json(raw) for raw in path.read_text().splitlines()]

    def weight_bytes(self, layout: str, name: str, rank: int) -> int:
        """Of the weights that a process holds."""
        return int((self._folder / layout / f"{name}.{rank}.bytes").read_text())

    def _plan(self, layout: str, name: str, *, sharded: bool, stop_after: int | None = None) -> Planned:
        (self._folder / layout).mkdir(exist_ok=True)
        return Planned(
            job=self.job(layout, name),
            sharded=sharded,
            stop_after=stop_after,
            lines=self._folder / layout / f"{name}.lines",
        )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Outcomes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.loading.compute_dtype", lambda: torch.float32)
        return Outcomes(tmp_path_factory.mktemp("together"), base_folder)


def close(found: list[StepLine], expected: list[StepLine]) -> None:
    assert [line.step for line in found] == [line.step for line in expected]
    for name in ("loss", "teacher_kl", "rehearsal_kl", "entropy", "grad_norm"):
        torch.testing.assert_close(
            torch.tensor([getattr(line, name) for line in found]),
            torch.tensor([getattr(line, name) for line in expected]),
            rtol=2e-4,
            atol=1e-5,
        )
    for name in ("response_tokens", "truncated_share", "learning_rate"):
        assert [getattr(line, name) for line in found] == [getattr(line, name) for line in expected]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_curve_and_the_weights_of_one(
    outcomes: Outcomes, layout: str, name: str
) -> None:
    single = outcomes.single[name]
    for rank in (0, 1):
        together = outcomes.lines(layout, name, rank)
        close(steps(together), steps(single))
        for kind in (PreflightLine, CheckpointLine, DoneLine):
            assert sum(isinstance(line, kind) for line in together) == sum(
                isinstance(line, kind) for line in single
            )
    assert len(steps(single)) == STEPS
    expected, start = weights(outcomes.job("one", name)), outcomes.job("one", name).recipe.learning_rate
    found = weights(outcomes.job(layout, name))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        # Adam moves a weight by about the learning rate per step, whatever the gradient's size.
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0.02 * start)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_sharded_each_process_holds_half_of_the_layers(outcomes: Outcomes, name: str, rank: int) -> None:
    """After the student's first pass: its embedding and last norm stay gathered, beside the process's part of
    them where they train; adapters are everywhere."""
    weights = load_file(Path(outcomes.job("one", name).base_path) / "model.safetensors")
    base = sum(tensor.nbytes for tensor in weights.values())
    gathered = sum(tensor.nbytes for key, tensor in weights.items() if ".layers." not in key)
    replicated, sharded = (outcomes.weight_bytes(layout, name, rank) for layout in LAYOUTS)
    if name.startswith("full"):
        assert sharded == replicated / 2 + gathered
    else:
        assert sharded == replicated - (base - gathered) / 2


@pytest.mark.parametrize("name", CUT)
def test_one_process_finishes_what_two_began(outcomes: Outcomes, name: str, exact: None) -> None:
    job = outcomes.job("cut", name)
    assert sorted(path.name for path in Path(job.checkpoint_dir).iterdir()) == ["step-000002", "step-000003"]
    rest = alone(job)
    assert CheckpointLine(step=3, resumed=True) in rest
    close(steps(rest), steps(outcomes.single[name])[3:])


def test_two_processes_finish_what_one_began(outcomes: Outcomes) -> None:
    rest = outcomes.lines("from one", "full", 0)
    assert CheckpointLine(step=3, resumed=True) in rest
    close(steps(rest), steps(outcomes.single["full"])[3:])


def test_one_process_is_its_own_group() -> None:
    assert (distributed.rank(), distributed.size()) == (0, 1)
    assert distributed.collect(distributed.share([1, 2, 3])) == [1, 2, 3]
    assert distributed.any_of(True)
    assert not distributed.any_of(False)
    assert distributed.add_up(2.5) == 2.5


@pytest.fixture
def start(tmp_path: Path) -> Callable[[TrainingJob], "subprocess.Popen[str]"]:
    def launch(job: TrainingJob) -> "subprocess.Popen[str]":
        path = tmp_path / "job.json"
        path.write_text(job.model_dump_json())
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", str(path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RATCHET_TRAINER_PROCESSES": "2"},
        )

    return launch


def test_a_refusal_of_two_processes_is_one_line_and_the_trainers_status(
    job: TrainingJob, start: Callable[[TrainingJob], "subprocess.Popen[str]"]
) -> None:
    process = start(job.model_copy(update={"recipe": RECIPE.model_copy(update={"on_small_gap": "refuse"})}))
    assert process.stdout is not None
    lines = [TRAINER_LINE.validate_json(raw) for raw in process.stdout]
    assert [line.type for line in lines] == ["preflight", "refused"]
    assert process.wait() == 65


def test_two_processes_stop_on_sigterm_with_one_checkpoint(
    job: TrainingJob, start: Callable[[TrainingJob], "subprocess.Popen[str]"]
) -> None:
    recipe = RECIPE.model_copy(update={"num_epochs": 100, "checkpoint_every": 1000})
    process = start(job.model_copy(update={"recipe": recipe}))
    assert process.stdout is not None
    for raw in process.stdout:
        if isinstance(TRAINER_LINE.validate_json(raw), StepLine):
            break
    process.send_signal(signal.SIGTERM)
    rest = [TRAINER_LINE.validate_json(raw) for raw in process.stdout]
    assert process.wait() == 75
    assert isinstance(rest[-1], CheckpointLine)
    assert [path.name for path in Path(job.checkpoint_dir).iterdir()] == [f"step-{rest[-1].step:06d}"]


def test_killing_the_launcher_leaves_no_process(
    job: TrainingJob, start: Callable[[TrainingJob], "subprocess.Popen[str]"]
) -> None:
    process = start(job.model_copy(update={"recipe": RECIPE.model_copy(update={"num_epochs": 100})}))
    assert process.stdout is not None
    process.stdout.readline()
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2
    process.kill()
    assert process.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    process.stdout.close()
