"""Scores of a candidate that outlive the worker which measured it."""

from pathlib import Path

from domain.measurement import ItemScore, Measurement
from worker.candidate_scores import CandidateScores


def measured(suite: str, score: float) -> Measurement:
    item = ItemScore(item="i1", prompt="p", output="o", expected="e", score=score)
    return Measurement(kind="skill", suite=suite, score=score, n=1, low=0, high=1, items=[item])


def test_kept_scores_are_known_by_suite_and_kind(tmp_path: Path) -> None:
    CandidateScores(tmp_path / "scores").keep(measured("a/../b", 0.5))
    scores = CandidateScores(tmp_path / "scores")
    assert {item: row.score for item, row in scores.known("skill", "a/../b").items()} == {"i1": 0.5}
    assert scores.known("general", "a/../b") == {}
    assert scores.known("skill", "other") == {}
    assert [path.parent for path in tmp_path.rglob("*.json")] == [tmp_path / "scores"]


def test_a_torn_file_is_measured_again(tmp_path: Path) -> None:
    scores = CandidateScores(tmp_path)
    scores.keep(measured("route", 1.0))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    assert scores.known("skill", "route") == {}
    scores.keep(measured("route", 0.25))
    assert scores.known("skill", "route")["i1"].score == 0.25
