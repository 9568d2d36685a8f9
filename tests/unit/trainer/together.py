"""Run jobs one after another in processes that torchrun started: `-m tests.unit.trainer.together PLAN`.

In float32 whatever the hardware prefers, so that one process and several can be compared tightly.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from pydantic import BaseModel, TypeAdapter

import trainer.loading
from domain.training import StepLine, TrainerLine, TrainingJob
from trainer import distributed
from trainer.lifecycle import run_to_end
from trainer.loading import load_model
from trainer.run import Interrupted, train


class Planned(BaseModel):
    job: TrainingJob
    sharded: bool
    stop_after: int | None
    """Steps after which the first process alone is asked to stop."""
    lines: Path
    """Beside it each process writes what it emits, and the bytes of weights that it holds."""


PLAN = TypeAdapter(list[Planned])


def launch(planned: list[Planned], plan: Path) -> None:
    """Run them in two processes; `plan` is written."""
    plan.write_bytes(PLAN.dump_json(planned))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "tests.unit.trainer.together", str(plan)],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def run(planned: Planned) -> None:
    os.environ["RATCHET_TRAINER_SHARDED"] = str(planned.sharded)
    model = load_model(Path(planned.job.base_path), planned.job.recipe, None)
    planned.lines.with_suffix(f".{distributed.rank()}.bytes").write_text(str(model.weight_bytes()))
    steps = 0

    def hear(line: TrainerLine) -> None:
        nonlocal steps
        steps += isinstance(line, StepLine)
        with planned.lines.with_suffix(f".{distributed.rank()}").open("a") as file:
            file.write(line.model_dump_json() + "\n")

    def stop() -> bool:
        return distributed.is_first() and steps == planned.stop_after

    try:
        train(planned.job, hear, stop)
    except Interrupted:
        assert planned.stop_after is not None


def main() -> int:
    trainer.loading.compute_dtype = lambda: torch.float32
    with distributed.joined():
        assert distributed.size() > 1
        for one in PLAN.validate_json(Path(sys.argv[1]).read_bytes()):
            run(one)
    return 0


if __name__ == "__main__":
    run_to_end(main)
