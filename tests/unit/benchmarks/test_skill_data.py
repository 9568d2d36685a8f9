"""The shared skills read as the product grades them."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.skill_data import HOLDOUT, evenly_spaced, load_skill, rows
from domain.grading import grade

SKILLS = ("banking_intent", "snips_call", "clinc_route", "fictional_facts")


def test_evenly_spaced_rows() -> None:
    assert evenly_spaced(range(10), 5) == [0, 2, 4, 6, 8]
    assert evenly_spaced(range(10), 3) == [0, 3, 6]
    assert evenly_spaced(range(3), 5) == [0, 1, 2]
    assert evenly_spaced(range(3), 0) == []


def test_the_splits_of_a_skill_do_not_meet(data: Path) -> None:
    skill = load_skill(data, "sort", 3)

    assert len(skill.teach.train) == 6
    assert len(skill.teach.holdout) == HOLDOUT
    assert [item.item for item in skill.dev] == ["sort-dev-32", "sort-dev-33"]
    assert [item.item for item in skill.evaluation] == ["sort-eval-0", "sort-eval-2", "sort-eval-4"]


def test_a_grader_that_the_product_lacks_is_named(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "skills", tmp_path / "skills")
    file = tmp_path / "skills" / "sort.train.jsonl"
    file.write_text(file.read_text().replace("regex_exact", "sql_norm_exact"))

    with pytest.raises(ValueError, match=r"sort\.train\.jsonl: no grader for 'sql_norm_exact'"):
        load_skill(tmp_path, "sort", 3)


@pytest.fixture(scope="module")
def reference(shared: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "graders_reference", shared / "eval" / "graders_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SKILLS)
def test_grades_are_the_reference_graders(name: str, shared: Path, reference: ModuleType) -> None:
    """Every eval row's own demonstration, its neighbour's, its own cut short, and with prose around it."""
    skill = load_skill(shared / "data", name, 1000)
    lines = rows(shared / "data" / "skills" / f"{name}.eval.jsonl")
    seen = set()
    for index, line in enumerate(lines):
        own, other = line["demonstration"], lines[index - 1]["demonstration"]
        for output in (own, other, own[:-2], f"  {own}\n", f"Sure: {own}", own.upper(), ""):
            expected = reference.score(line["grader"], output)
            assert grade(skill.teach.grader, output, line["answer"]) == expected, (line["id"], output)
            seen.add(expected)
    assert seen == {0.0, 1.0}


def test_facts_are_resampled_by_person_and_other_skills_by_item(shared: Path) -> None:
    facts, banking = (
        load_skill(shared / "data", name, 150) for name in ("fictional_facts", "banking_intent")
    )

    assert len(set(facts.clusters.values())) == 30
    assert len(set(banking.clusters.values())) == len(banking.evaluation) == 150
