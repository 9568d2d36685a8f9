"""What survives a kill, and what cannot be mixed."""

import json
from pathlib import Path

import pytest

from benchmarks.continual import ARMS
from benchmarks.study import Arm, Study, StudySettings, load_arms
from domain.recipe import Recipe
from tests.unit.benchmarks.builders import line

SETTINGS = StudySettings(
    base_model="tiny", skills=["a"], steps=None, eval_rows=60, general_items=100, pass_items=4
)


def test_results_survive_and_a_torn_line_is_measured_again(tmp_path: Path) -> None:
    study = Study(tmp_path, SETTINGS)
    first, second = line("x", 1, {"a": 0.5}, role="sdft"), line("y", 1, {"a": 0.25}, role="sft")
    study.append(first)
    study.append(second)
    whole = study.results_file.read_bytes()
    study.results_file.write_bytes(whole[:-40])
    again = Study(tmp_path, SETTINGS)

    assert again.results == {("x", 0, 1): first}
    again.append(second)
    assert study.results_file.read_bytes() == whole
    assert Study(tmp_path, SETTINGS).results == {("x", 0, 1): first, ("y", 0, 1): second}


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    Study(tmp_path, SETTINGS)

    with pytest.raises(ValueError, match="eval_rows 60, not 150"):
        Study(tmp_path, SETTINGS.model_copy(update={"eval_rows": 150}))


def test_another_recipe_under_the_same_name_is_refused(tmp_path: Path) -> None:
    study = Study(tmp_path, SETTINGS)
    study.append(line("x", 1, {"a": 0.5}, role="sft"))
    study.check_arm("x", Arm(role="sft"))

    with pytest.raises(ValueError, match=r"arm 'x' with \{\}, not \{\"learning_rate\": 0.1\}"):
        study.check_arm("x", Arm(role="sft", changes={"learning_rate": 0.1}))


def arms_file(folder: Path, arms: object) -> Path:
    file = folder / "arms.json"
    file.write_text(json.dumps(arms))
    return file


def test_an_arm_is_the_small_models_recipe_with_changes(tmp_path: Path) -> None:
    file = arms_file(tmp_path, {"x": {"role": "sft", "changes": {"method": "sft", "learning_rate": 0.5}}})
    recipe = load_arms(file, None)["x"].recipe(seed=3, steps=7)

    assert (recipe.method, recipe.learning_rate, recipe.seed, recipe.max_steps) == ("sft", 0.5, 3, 7)
    assert recipe.context == "turns"
    assert recipe.on_small_gap == "train"


@pytest.mark.parametrize(
    ("arms", "names", "message"),
    [
        ({"x": {"role": "sft"}}, ["y"], "no arm y"),
        ({"x": {"role": "sft", "changes": {"lerning_rate": 1}}}, None, "arm 'x'.*\n?.*lerning_rate"),
        ({"x": {"role": "best"}}, None, "x.role"),
        ({"base": {"role": "sft"}}, None, "'base' is no arm's name"),
    ],
)
def test_a_bad_arms_file_is_named(
    tmp_path: Path, arms: object, names: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_arms(arms_file(tmp_path, arms), names)


def test_only_the_arms_asked_for_must_validate(tmp_path: Path) -> None:
    file = arms_file(tmp_path, {"x": {"role": "sft"}, "y": {"role": "sft", "changes": {"unknown": 1}}})

    assert list(load_arms(file, ["x"])) == ["x"]


def test_every_arm_that_comes_along_is_a_recipe() -> None:
    arms = load_arms(ARMS, None)

    assert arms["sdft"].recipe(0, None) == Recipe.small_model().model_copy(update={"on_small_gap": "train"})
    roles = {arm.role for arm in arms.values()}
    assert roles == {"sdft", "sft", "sft_rehearsal", "control", "ablation"}
    # Whoever says that rehearsal did it finds supervised arms with the same share.
    shares = {arm.recipe(0, None).rehearsal_share for arm in arms.values() if arm.role == "sft_rehearsal"}
    assert shares == {Recipe.small_model().rehearsal_share}
