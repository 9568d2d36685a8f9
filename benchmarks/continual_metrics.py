"""From a study's lines to its figures: the product's continual-learning metrics, with intervals."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal

from pydantic import BaseModel, ConfigDict

from benchmarks.bootstrap import Estimate, estimate, ratio
from benchmarks.lineages import METRICS, Lineage, draws, lineages_of, stages_of
from benchmarks.study import PASS_KS, PASS_SAMPLES, Key, Role, StageResult

Claim = Literal["yes", "no", "inconclusive"]


class ArmFigures(BaseModel):
    """One arm over all its seeds, at the last stage that each of them has reached.

    `new_skill_score` is the mean of R[k_s, s], each skill right after it was taught. `general_drop` is the
    mean loss of accuracy over the general benchmarks, `likelihood_drop` that of the probability given to
    the right options. `dev_score` is `new_skill_score` on dev items, by which candidates of one method
    are compared. None: not defined at this stage, or not measured.
    """

    model_config = ConfigDict(frozen=True)

    role: Role
    stages: int
    seeds: list[int]
    acc: float | None
    bwt: float | None
    forgetting: float | None
    forgetting_worst: float | None
    new_skill_score: float | None
    general_drop: float | None
    likelihood_drop: float | None
    kl_to_base: float | None
    """KL(base || version) on ordinary prompts, nats per token."""
    intervals: dict[str, tuple[float | None, float | None]]
    """95% intervals of the figures above."""
    dev_score: float
    ordinary_kept: float
    """Share of ordinary prompts not answered in a taught skill's format."""
    answer_tokens: float
    """Mean length of greedy answers to the items of the skills taught."""
    train_seconds: float
    """Mean of a stage."""
    pass_at_k: dict[int, float]
    """On items of the skills taught, at temperature 1; empty where none were sampled."""


class Comparison(BaseModel):
    """One arm beside another on the same stages, seeds and items.

    A ratio above 1 says that `arm` lost more than `against`; it is None where `against` lost nothing. The
    claims are read off the interval of loss(arm) - loss(against) / 2, which is defined everywhere.
    """

    model_config = ConfigDict(frozen=True)

    arm: str
    against: str
    stages: int
    seeds: list[int]
    new_skill_difference: Estimate
    forgetting_ratio: Estimate
    general_drop_ratio: Estimate
    likelihood_drop_ratio: Estimate
    forgetting_difference: Estimate
    general_drop_difference: Estimate
    likelihood_drop_difference: Estimate
    forgetting_below_half: Claim
    general_drop_below_half: Claim
    likelihood_drop_below_half: Claim


@dataclass(frozen=True)
class Figures:
    """Everything that the report shows."""

    arms: dict[str, ArmFigures]
    sdft_vs_sft: Comparison | None
    """The best sdft arm against the best plain sft arm, each chosen on the dev split."""
    comparisons: dict[str, Comparison]
    """The best sdft arm against every arm of the other methods."""


def analyse(
    results: Mapping[Key, StageResult],
    skills: Sequence[str],
    clusters: Mapping[str, str],
) -> Figures:
    """Figures of every arm that has finished a stage, in the order in which they came.

    `skills` are the study's, in the order of its stages. `clusters` tells of an item what it is resampled
    with; items that it does not have stand alone.
    """
    roles = {result.arm: result.role for result in results.values() if result.role is not None}
    lineages = {name: found for name in roles if (found := lineages_of(results, name))}
    figures = {name: _figures(roles[name], found, skills, clusters) for name, found in lineages.items()}

    def best(role: Role) -> str | None:
        candidates = [name for name in figures if roles[name] == role]
        return max(candidates, key=lambda n: (figures[n].stages, figures[n].dev_score), default=None)

    sdft, sft = best("sdft"), best("sft")
    comparisons: dict[str, Comparison] = {}
    for name, other in lineages.items():
        if sdft is not None and roles[name] in ("sft", "sft_rehearsal", "control"):
            comparison = _compare((sdft, lineages[sdft]), (name, other), skills, clusters)
            if comparison is not None:
                comparisons[name] = comparison
    return Figures(figures, comparisons.get(sft) if sft else None, comparisons)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k answers is right, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021).

    Raises ValueError when k is above `samples`: that cannot be estimated from them.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} from {correct} correct of {samples} samples")
    return 1 - comb(samples - correct, k) / comb(samples, k)


def _figures(
    role: Role, lineages: Mapping[int, Lineage], skills: Sequence[str], clusters: Mapping[str, str]
) -> ArmFigures:
    estimates = {name: estimate(values) for name, values in draws(lineages, skills, clusters).items()}
    taught = skills[: stages_of(lineages)]
    last = [lineage[-1] for lineage in lineages.values()]
    stages = [version for lineage in lineages.values() for version in lineage[1:]]
    passes = [c for version in last for skill in taught for c in version.passes.get(skill, {}).values()]
    return ArmFigures.model_validate(
        {
            "role": role,
            "stages": len(taught),
            "seeds": list(lineages),
            **{name: estimates[name].value for name in METRICS},
            "intervals": {name: estimates[name][1:] for name in METRICS},
            "dev_score": _mean(_mean(version.dev.values()) for version in stages),
            "ordinary_kept": _mean(score for version in last for score in version.ordinary.values()),
            "answer_tokens": _mean(version.answer_tokens[skill] for version in last for skill in taught),
            "train_seconds": _mean(v.training.seconds for v in stages if v.training is not None),
            "pass_at_k": {k: _mean(pass_at_k(PASS_SAMPLES, c, k) for c in passes) for k in PASS_KS}
            if passes
            else {},
        }
    )


def _compare(
    one: tuple[str, Mapping[int, Lineage]],
    other: tuple[str, Mapping[int, Lineage]],
    skills: Sequence[str],
    clusters: Mapping[str, str],
) -> Comparison | None:
    """None without a seed in common."""
    (arm, left), (against, right) = one, other
    seeds = sorted(left.keys() & right.keys())
    if not seeds:
        return None
    stages = min(stages_of(left), stages_of(right))
    a = draws({seed: left[seed][: stages + 1] for seed in seeds}, skills, clusters)
    b = draws({seed: right[seed][: stages + 1] for seed in seeds}, skills, clusters)
    losses = ("forgetting", "general_drop", "likelihood_drop")
    return Comparison.model_validate(
        {
            "arm": arm,
            "against": against,
            "stages": stages,
            "seeds": seeds,
            "new_skill_difference": estimate(a["new_skill_score"] - b["new_skill_score"]),
            **{f"{loss}_ratio": ratio(a[loss], b[loss]) for loss in losses},
            **{f"{loss}_difference": estimate(a[loss] - b[loss]) for loss in losses},
            **{f"{loss}_below_half": _claim(estimate(a[loss] - b[loss] / 2)) for loss in losses},
        }
    )


def _claim(excess: Estimate) -> Claim:
    """Whether `excess` is below zero."""
    if excess.high is not None and excess.high < 0:
        return "yes"
    return "no" if excess.low is not None and excess.low > 0 else "inconclusive"


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
