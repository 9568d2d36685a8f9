"""However a run is interrupted, its end is that of the uninterrupted one, bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from domain.training import CheckpointLine, DoneLine, StepLine, TrainerLine, TrainingJob
from trainer.loading import load_model
from trainer.run import Interrupted, train

STEPS = 5


class Killed(Exception):
    """Stands for a process that ends without a word."""


def run(job: TrainingJob, *, stop_after: int | None = None, die_in: int | None = None) -> list[TrainerLine]:
    """`stop_after`: steps of this process before it is asked to stop; `die_in`: the 1-based step of the run
    after which it dies."""
    lines: list[TrainerLine] = []

    def hear(line: TrainerLine) -> None:
        lines.append(line)
        if isinstance(line, StepLine) and line.step == die_in:
            raise Killed

    train(job, hear, lambda: sum(isinstance(line, StepLine) for line in lines) == stop_after)
    return lines


def state(job: TrainingJob) -> dict[str, torch.Tensor]:
    """Everything that the last checkpoint and the version hold."""
    checkpoint = load_file(Path(job.checkpoint_dir) / f"step-{STEPS:06d}" / "tensors.safetensors")
    (file,) = Path(job.output_dir).glob("*.safetensors")
    return checkpoint | {f"out/{name}": tensor for name, tensor in load_file(file).items()}


def elsewhere(job: TrainingJob, name: str) -> TrainingJob:
    folder = Path(job.output_dir).parent / name
    return job.model_copy(update={"checkpoint_dir": str(folder / "ck"), "output_dir": str(folder / "out")})


@pytest.fixture
def parent(base_folder: Path, job: TrainingJob, tmp_path: Path) -> Path:
    """A version that is not the base."""
    model = load_model(base_folder, job.recipe, None)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters("student").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_student(tmp_path / "parent", "tiny")
    return tmp_path / "parent"


@pytest.fixture
def planned(request: pytest.FixtureRequest, job: TrainingJob, parent: Path) -> TrainingJob:
    changes = {
        "max_steps": STEPS,
        "checkpoint_every": STEPS,
        "early_stop_every": 2,
        "early_stop_patience": 100,
        **request.param,
    }
    recipe = job.recipe.model_copy(update=changes)
    return job.model_copy(update={"recipe": recipe, "parent_adapter_path": str(parent)})


KINDS = {
    "continued": {},
    "merged": {"parent_adapter": "merge"},
    "full": {"lora_rank": 0, "learning_rate": 1e-3},
}
EVERY_KIND_AND_TEACHER = [
    pytest.param({**kind, "teacher": teacher, "rollout_every": every}, id=f"{name}-{teacher}-{every}")
    for name, kind in KINDS.items()
    for teacher, every in (("ema", 3), ("parent", 1), ("base", 2), ("live", 2))
]


@pytest.mark.parametrize("planned", EVERY_KIND_AND_TEACHER, indirect=True)
def test_stopped_after_every_single_step(planned: TrainingJob) -> None:
    """Rounds of three samplings are entered in their middle too. Compared are the student, its average, both
    moments, the best weights so far and the version."""
    whole = run(planned)
    cut = elsewhere(planned, "cut")
    for step in range(1, STEPS):
        with pytest.raises(Interrupted):
            run(cut, stop_after=1)
        assert (Path(cut.checkpoint_dir) / f"step-{step:06d}").is_dir()
    last = run(cut)
    assert last[0] == CheckpointLine(step=STEPS - 1, resumed=True)
    assert isinstance(last[-1], DoneLine)
    assert [line.loss for line in last if isinstance(line, StepLine)] == [
        line.loss for line in whole if isinstance(line, StepLine) and line.step == STEPS
    ]
    expected, found = state(planned), state(cut)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    kinds = {name.partition("/")[0] for name in expected}
    average = {"ema"} if planned.recipe.teacher == "ema" else set()
    assert kinds == {"student", "best", "out", "adam.step", "adam.exp_avg", "adam.exp_avg_sq", *average}
    assert any(tensor.any() for name, tensor in expected.items() if name.startswith("adam.exp_avg/"))


@pytest.mark.parametrize(
    "planned",
    [
        pytest.param({"checkpoint_every": 2, "rollout_every": 3, "max_steps": STEPS + 1}, id="adapter"),
        pytest.param(
            {"checkpoint_every": 2, "rollout_every": 3, "lora_rank": 0, "max_steps": STEPS + 1}, id="full"
        ),
    ],
    indirect=True,
)
def test_killed_between_two_checkpoints(planned: TrainingJob) -> None:
    """Steps after the last checkpoint are taken again and come out the same."""
    whole = run(planned)
    cut = elsewhere(planned, "cut")
    with pytest.raises(Killed):
        run(cut, die_in=4)  # before the checkpoint of step 4
    rest = run(cut)
    assert rest[0] == CheckpointLine(step=2, resumed=True)
    losses = {line.step: line.loss for line in whole if isinstance(line, StepLine)}
    again = {line.step: line.loss for line in rest if isinstance(line, StepLine)}
    assert again == {step: losses[step] for step in range(3, STEPS + 2)}
    (version,) = Path(planned.output_dir).glob("*.safetensors")
    expected, found = load_file(version), load_file(Path(cut.output_dir) / version.name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
