"""A study's figures against the shared worked matrix and by hand."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.continual_metrics import analyse, pass_at_k
from benchmarks.lineages import lineages_of
from benchmarks.study import BASE
from tests.unit.benchmarks.builders import line, lineage

VECTORS = Path(__file__).parents[3].parent / "shared" / "eval" / "metric_vectors.json"
SKILLS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    if not VECTORS.is_file():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{VECTORS} is missing, and CI must have it")
        pytest.skip(f"no shared vectors at {VECTORS}")
    loaded: dict[str, Any] = json.loads(VECTORS.read_text())
    return loaded


def test_the_shared_matrix(vectors: dict[str, Any]) -> None:
    rows = [dict(zip(SKILLS, row, strict=True)) for row in [vectors["baseline_R0"], *vectors["R"]]]
    base, new = zip(*vectors["prior_base_vs_new"].values(), strict=True)
    names = list(vectors["prior_base_vs_new"])
    general = [dict(zip(names, shares, strict=True)) for shares in (base, new)]
    figures = analyse(lineage("x", "sdft", rows, general), SKILLS, {}).arms["x"]

    assert figures.acc == pytest.approx(vectors["ACC_GEM"])
    assert figures.bwt == pytest.approx(vectors["BWT_GEM_paper"])
    assert figures.forgetting == pytest.approx(vectors["forgetting_Chaudhry"])
    assert figures.new_skill_score == pytest.approx(vectors["learning_accuracy_LA"])
    assert figures.general_drop == pytest.approx(-vectors["prior_delta_mean"])
    # By hand: a falls from its best, 0.84, to 0.6; b from 0.9 to 0.85.
    assert figures.forgetting_worst == pytest.approx(0.24)
    low, high = figures.intervals["forgetting"]
    assert low is not None
    assert high is not None
    assert low < 0.145 < high


def test_an_average_over_seeds_is_taken_of_metrics() -> None:
    """Forgetting is 0.4 with seed 0 and 0 with seed 1, where a rises: max(0.5) - 0.5. Mean of scores
    first would give max(0.7) - 0.5 = 0.2 too, but BWT 0.2 lower: by seed it is (-0.4 + 0) / 2."""
    results = lineage("x", "sdft", [{"a": 0, "b": 0}, {"a": 0.9, "b": 0}, {"a": 0.5, "b": 0.8}])
    results |= lineage("x", "sdft", [{"a": 0, "b": 0}, {"a": 0.5, "b": 0}, {"a": 0.5, "b": 0.6}], seed=1)
    figures = analyse(results, ["a", "b"], {}).arms["x"]

    assert figures.seeds == [0, 1]
    assert figures.forgetting == pytest.approx(0.2)
    assert figures.bwt == pytest.approx(-0.2)
    assert figures.new_skill_score == pytest.approx((0.9 + 0.8 + 0.5 + 0.6) / 4)
    low, high = figures.intervals["forgetting"]
    # Drawing seed 0 twice or seed 1 twice is half of all draws: the seeds' spread is in the interval.
    assert low is not None
    assert high is not None
    assert low < 0.05
    assert high > 0.35


def test_an_arm_is_read_at_the_stage_that_all_its_seeds_have() -> None:
    results = lineage("x", "sdft", [{"a": 0, "b": 0}, {"a": 0.9, "b": 0}, {"a": 0.5, "b": 0.8}])
    results["x", 1, 1] = line("x", 1, {"a": 0.7, "b": 0}, role="sdft", seed=1)
    figures = analyse(results, ["a", "b"], {}).arms["x"]

    assert figures.stages == 1
    assert figures.acc == pytest.approx(0.8)
    assert figures.forgetting is None
    assert figures.intervals["forgetting"] == (None, None)


def test_no_lineage_without_the_base_or_with_a_gap() -> None:
    rows = [{"a": 0.0}, {"a": 0.9}, {"a": 0.9}, {"a": 0.9}]
    results = lineage("x", "sdft", rows)
    del results["x", 0, 2]

    assert [version.stage for version in lineages_of(results, "x")[0]] == [0, 1]
    del results[BASE, 0, 0]
    assert lineages_of(results, "x") == {}


def forgetful(arm: str, role: Any, forgotten: float, general: float, of: int = 400) -> dict[Any, Any]:
    rows = [{"a": 0, "b": 0}, {"a": 0.9, "b": 0}, {"a": 0.9 - forgotten, "b": 0.8}]
    shares = [{"g": 0.5, "likelihood": 0.5}, {"g": general, "likelihood": general}]
    return lineage(arm, role, rows, shares, of=of)


def test_a_comparison_by_hand() -> None:
    results = forgetful("sdft", "sdft", 0.05, 0.49) | forgetful("sft", "sft", 0.4, 0.3)
    found = analyse(results, ["a", "b"], {}).sdft_vs_sft

    assert found is not None
    assert (found.arm, found.against, found.stages, found.seeds) == ("sdft", "sft", 2, [0])
    assert found.forgetting_ratio.value == pytest.approx(0.05 / 0.4)
    assert found.forgetting_difference.value == pytest.approx(-0.35)
    assert found.general_drop_ratio.value == pytest.approx(0.01 / 0.2)
    assert found.likelihood_drop_ratio.value == pytest.approx(0.01 / 0.2)
    assert found.new_skill_difference == (0, 0, 0)
    assert found.forgetting_below_half == found.general_drop_below_half == "yes"


@pytest.mark.parametrize(("forgotten", "claim"), [(0.05, "yes"), (0.2, "inconclusive"), (0.38, "no")])
def test_the_claim_of_half_is_three_valued(forgotten: float, claim: str) -> None:
    results = forgetful("sdft", "sdft", forgotten, 0.5) | forgetful("sft", "sft", 0.4, 0.5)
    found = analyse(results, ["a", "b"], {}).sdft_vs_sft

    assert found is not None
    assert found.forgetting_below_half == claim
    # Neither lost anything in general: there is no ratio, and nothing is claimed.
    assert found.general_drop_ratio.value is None
    assert found.general_drop_below_half == "inconclusive"


def test_the_dev_split_chooses_who_speaks_for_a_method() -> None:
    results = forgetful("sdft", "sdft", 0.05, 0.5) | forgetful("low", "sft", 0.1, 0.5)
    high = forgetful("high", "sft", 0.4, 0.5)
    better = {"dev": {"d": 1.0}}
    results |= {key: one.model_copy(update=better) for key, one in high.items() if key[0] == "high"}
    figures = analyse(results, ["a", "b"], {})

    assert figures.sdft_vs_sft is not None
    assert figures.sdft_vs_sft.against == "high"
    assert set(figures.comparisons) == {"low", "high"}


def test_pass_at_k_by_hand() -> None:
    """Of 4 samples 1 is right: two draws miss it with 3/4 x 2/3 = 1/2."""
    assert pass_at_k(4, 1, 1) == pytest.approx(0.25)
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(4, 1, 4) == 1
    assert pass_at_k(4, 0, 4) == 0
    assert pass_at_k(32, 30, 4) == 1
    with pytest.raises(ValueError, match="pass@5 from 1 correct of 4"):
        pass_at_k(4, 1, 5)


def test_pass_at_k_is_averaged_over_items_of_taught_skills_only() -> None:
    results = {(BASE, 0, 0): line(BASE, 0, {"a": 0, "b": 0})}
    results["x", 0, 1] = line("x", 1, {"a": 1, "b": 0}, role="sdft", passes={"a": 16, "b": 0})
    found = analyse(results, ["a", "b"], {}).arms["x"].pass_at_k

    assert found[1] == pytest.approx(0.5)
    assert found[32] == 1
