"""Lines of a study as lineages, and their metrics on resampled items and seeds."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count

import numpy as np

from benchmarks.bootstrap import DRAWS, Floats, item_weights, seed_weights
from benchmarks.study import BASE, Key, StageResult
from evaluation.benchmarks import LIKELIHOOD
from evaluation.forgetting import summarise

METRICS = (
    "acc",
    "bwt",
    "forgetting",
    "forgetting_worst",
    "new_skill_score",
    "general_drop",
    "likelihood_drop",
    "kl_to_base",
)
"""As ArmFigures describes them."""
Lineage = Sequence[StageResult]
"""Stages 0 (the base) to T of one arm and seed."""
Draws = dict[str, Floats]
"""By metric, [1 + DRAWS]: the figure on the items as they are, then on each resample."""


def lineages_of(results: Mapping[Key, StageResult], arm: str) -> dict[int, Lineage]:
    """By seed, the arm's versions from the base to the last stage that all its seeds have reached; {}
    without the base or a first stage."""
    seeds = sorted(seed for name, seed, stage in results if name == arm and stage == 1)
    if not seeds or (BASE, 0, 0) not in results:
        return {}
    reached = min(next(k for k in count(1) if (arm, seed, k + 1) not in results) for seed in seeds)
    return {
        seed: [results[BASE, 0, 0], *(results[arm, seed, k] for k in range(1, reached + 1))] for seed in seeds
    }


def score_rows(lineage: Lineage, skills: Sequence[str]) -> list[dict[str, float]]:
    """R[t, s] of one lineage: the mean score of each skill after each stage."""
    return [{skill: _mean(version.skills[skill].values()) for skill in skills} for version in lineage]


def stages_of(lineages: Mapping[int, Lineage]) -> int:
    """How many stages the lineages of one arm have."""
    return len(next(iter(lineages.values()))) - 1


def draws(lineages: Mapping[int, Lineage], skills: Sequence[str], clusters: Mapping[str, str]) -> Draws:
    """Every metric, averaged over resampled seeds."""
    by_seed = [_lineage_draws(lineage, skills, clusters) for lineage in lineages.values()]
    weights = seed_weights(list(lineages))
    return {
        name: np.sum(weights * np.stack([found[name] for found in by_seed], axis=1), axis=1)
        for name in METRICS
    }


def _lineage_draws(lineage: Lineage, skills: Sequence[str], clusters: Mapping[str, str]) -> Draws:
    taught = skills[: len(lineage) - 1]
    learned = {skill: stage for stage, skill in enumerate(taught, start=1)}
    scores = {
        skill: _means(skill, [version.skills[skill] for version in lineage], clusters) for skill in taught
    }
    general = {
        name: _means(name, [lineage[0].general[name], lineage[-1].general[name]], clusters)
        for name in lineage[0].general
    }
    likelihood = general.pop(LIKELIHOOD, None)
    found = {name: np.full(1 + DRAWS, np.nan) for name in METRICS}
    for draw in range(1 + DRAWS):
        summary = summarise(
            [
                {skill: float(values[t, draw]) for skill, values in scores.items()}
                for t in range(len(lineage))
            ],
            learned,
            [{g: float(values[t, draw]) for g, values in general.items()} for t in (0, 1)],
        )
        for name, value in (
            ("acc", summary.acc),
            ("bwt", summary.bwt),
            ("forgetting", summary.forgetting_mean),
            ("forgetting_worst", summary.forgetting_worst),
            ("general_drop", summary.general_drop_mean),
        ):
            found[name][draw] = np.nan if value is None else value
    found["new_skill_score"] = np.mean([scores[skill][stage] for skill, stage in learned.items()], axis=0)
    if likelihood is not None:
        found["likelihood_drop"] = likelihood[0] - likelihood[1]
    if lineage[-1].kl_to_base:
        found["kl_to_base"] = _means("kl", [lineage[-1].kl_to_base], clusters)[0]
    return found


def _means(suite: str, versions: Sequence[Mapping[str, float]], clusters: Mapping[str, str]) -> Floats:
    """[versions, 1 + DRAWS] weighted means over the items, which all versions share."""
    items = list(versions[0])
    values = np.array([[version[item] for item in items] for version in versions])
    means: Floats = values @ item_weights(suite, tuple(clusters.get(item, item) for item in items)).T
    return means


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
