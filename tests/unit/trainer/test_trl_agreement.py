"""On equal inputs our loss and gradient are those of TRL's SDFTTrainer, in every mode that both have.

RATCHET_TRL_PYTHON names an interpreter with TRL where this one has none.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.contest import Unmeasurable
from benchmarks.trainer_versus_trl import check_trl
from benchmarks.trl_agreement import CASES, Agreement, PromptsDiffer, check_prompts, compare
from domain.demonstration import Demonstration
from tests.unit.trainer.builders import demonstration

TRL_PYTHON = os.environ.get("RATCHET_TRL_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def demonstrations() -> list[Demonstration]:
    """Prompts and responses of different lengths, so that TRL pads what we pack."""
    texts = [
        ("name it", "A"),
        ("a longer question, this", "BCD"),
        ("third", "a long expert answer"),
        ("4", "D"),
    ]
    return [demonstration(prompt, response) for prompt, response in texts]


@pytest.fixture(scope="module")
def agreement(
    base_folder: Path, demonstrations: list[Demonstration], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Agreement]:
    try:
        check_trl(TRL_PYTHON)
    except Unmeasurable as missing:
        pytest.skip(str(missing))
    found = compare(base_folder, demonstrations, TRL_PYTHON, tmp_path_factory.mktemp("agreement"))
    return {one.case: one for one in found}


@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_loss_and_gradient_are_trls(agreement: dict[str, Agreement], case: str) -> None:
    found = agreement[case]
    assert found.loss > 1e-3  # student and teacher differ: equal zeros would prove nothing
    assert found.loss == pytest.approx(found.trl_loss, abs=1e-4, rel=1e-4)
    assert found.grad_norm == pytest.approx(found.trl_grad_norm, rel=1e-4)


def test_the_modes_are_different_losses(agreement: dict[str, Agreement]) -> None:
    losses = [one.trl_loss for one in agreement.values()]
    assert len({round(value, 5) for value in losses}) == len(losses)


def test_other_prompts_are_no_agreement(base_folder: Path, demonstrations: list[Demonstration]) -> None:
    theirs = [[[1]] * len(demonstrations)] * 2
    with pytest.raises(PromptsDiffer, match="the student's prompt of demonstration 1"):
        check_prompts(base_folder, demonstrations, theirs)


def test_an_interpreter_without_trl_is_named(tmp_path: Path) -> None:
    other = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(other)], check=True)
    with pytest.raises(Unmeasurable, match=r"bin/python has no TRL"):
        check_trl(str(other / "bin" / "python"))
