"""Metrics against the shared worked matrix and, where it says nothing, by hand."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from evaluation.forgetting import acc, bwt, forgetting, fwt, gain, general_drop, retention, summarise

VECTORS = Path(__file__).parents[3].parent / "shared" / "eval" / "metric_vectors.json"
LEARNED = {"a": 1, "b": 2, "c": 3}
BY_HAND: list[dict[str, float | None]] = [
    {"a": 0.1, "b": 0.2, "c": 0.1},
    {"a": 0.8, "b": 0.3, "c": 0.1},
    {"a": 0.84, "b": 0.9, "c": 0.2},
    {"a": 0.6, "b": 0.85, "c": 0.95},
]


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    if not VECTORS.is_file():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{VECTORS} is missing, and CI must have it")
        pytest.skip(f"no shared vectors at {VECTORS}")
    loaded: dict[str, Any] = json.loads(VECTORS.read_text())
    return loaded


def test_the_shared_matrix(vectors: dict[str, Any]) -> None:
    rows = [vectors["baseline_R0"], *vectors["R"]]
    scores = [dict(zip("abc", row, strict=True)) for row in rows]
    base, new = zip(*vectors["prior_base_vs_new"].values(), strict=True)
    names = list(vectors["prior_base_vs_new"])
    general = [dict(zip(names, base, strict=True)), dict(zip(names, new, strict=True))]
    found = summarise(scores, LEARNED, general)
    assert found.acc == pytest.approx(vectors["ACC_GEM"])
    assert found.bwt == pytest.approx(vectors["BWT_GEM_paper"])
    assert found.fwt == pytest.approx(vectors["FWT_GEM_paper"])
    assert found.forgetting_mean == pytest.approx(vectors["forgetting_Chaudhry"])
    assert found.general_drop_mean == pytest.approx(-vectors["prior_delta_mean"])
    when_learned = [skill.when_learned or 0.0 for skill in found.skills.values()]
    # ACC = LA + (T - 1) / T * BWT, an identity of the paper's definitions.
    assert sum(when_learned) / 3 == pytest.approx(vectors["learning_accuracy_LA"])
    assert found.acc == pytest.approx(sum(when_learned) / 3 + 2 / 3 * (found.bwt or 0.0))


def test_by_hand() -> None:
    assert acc(BY_HAND, LEARNED) == pytest.approx(0.8)
    assert bwt(BY_HAND, LEARNED) == pytest.approx(((0.6 - 0.8) + (0.85 - 0.9)) / 2)
    assert fwt(BY_HAND, LEARNED) == pytest.approx(((0.3 - 0.2) + (0.2 - 0.1)) / 2)
    assert forgetting(BY_HAND, LEARNED) == pytest.approx({"a": 0.24, "b": 0.05})
    assert gain(BY_HAND, LEARNED) == pytest.approx({"a": 0.7, "b": 0.7, "c": 0.85})
    assert retention(BY_HAND, LEARNED) == pytest.approx({"a": 0.75, "b": 0.85 / 0.9, "c": 1.0})
    found = summarise(BY_HAND, LEARNED, [])
    assert found.forgetting_worst == pytest.approx(0.24)
    assert found.skills["c"].forgetting is None


def test_forgetting_can_be_negative() -> None:
    scores: list[dict[str, float | None]] = [{"a": 0.0}, {"a": 0.5}, {"a": 0.7}]
    assert forgetting(scores, {"a": 1}) == pytest.approx({"a": -0.2})


def test_unmeasured_is_none_never_zero() -> None:
    scores: list[dict[str, float | None]] = [{"a": 0.1}, {"a": 0.8, "b": 0.2}, {"b": 0.9}]
    found = summarise(scores, {"a": 1, "b": 2}, [{"piqa": 0.6}, {}])
    assert found.acc is None
    assert found.bwt is None
    assert found.fwt is None
    assert found.forgetting_worst is None
    assert found.skills["a"].retention is None
    assert found.skills["b"].gain is None
    assert found.general_drop == {"piqa": None}
    assert found.general_drop_mean is None


def test_the_best_measured_version_in_between_counts() -> None:
    scores: list[dict[str, float | None]] = [{}, {"a": None}, {"a": 0.9}, {"a": 0.5}]
    assert forgetting(scores, {"a": 1}) == pytest.approx({"a": 0.4})
    assert bwt(scores, {"a": 1}) is None


def test_retention_of_nothing_learned_is_none() -> None:
    assert retention([{"a": 0.0}, {"a": 0.0}, {"a": 0.3}], {"a": 1}) == {"a": None}


def test_a_base_without_updates_has_no_metrics() -> None:
    found = summarise([{"a": 0.3}], {}, [{"piqa": 0.6}])
    assert (found.acc, found.bwt, found.forgetting_worst) == (None, None, None)
    assert found.general_drop == {"piqa": 0.0}


def test_general_drop_is_a_loss_when_positive() -> None:
    assert general_drop([{"g": 0.5}, {"g": 0.1}, {"g": 0.47}]) == pytest.approx({"g": 0.03})
