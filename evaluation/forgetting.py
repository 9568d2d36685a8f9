"""Continual-learning metrics from a score matrix along one lineage. Pure.

`scores[t][s]` is the score of the version at position t (0 = the base, the last = the version asked
about) on skill s; None or absent where it was not measured. `learned[s]` is k_s >= 1, the position of
the version that first learned s. Unmeasured is None throughout, never 0: a mean is None as soon as one
of its terms is, since the mean of the rest would flatter.
"""

from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

Scores = Sequence[Mapping[str, float | None]]
Learned = Mapping[str, int]


class SkillForgetting(BaseModel):
    """One learned skill at the end of the lineage."""

    model_config = ConfigDict(frozen=True)

    base: float | None
    when_learned: float | None
    now: float | None
    gain: float | None
    """R[k_s] - R[0]."""
    forgetting: float | None
    """Best score from k_s until before the last version, minus the last; None when learned last."""
    retention: float | None
    """R[T] / R[k_s]; None where R[k_s] is 0."""


class ForgettingSummary(BaseModel):
    """All metrics of DESIGN section 6."""

    model_config = ConfigDict(frozen=True)

    acc: float | None
    bwt: float | None
    fwt: float | None
    forgetting_mean: float | None
    forgetting_worst: float | None
    gain_mean: float | None
    retention_mean: float | None
    general_drop_mean: float | None
    skills: dict[str, SkillForgetting]
    general_drop: dict[str, float | None]


def summarise(scores: Scores, learned: Learned, general: Scores) -> ForgettingSummary:
    """Every metric at once. `general` is indexed as `scores` is, by general benchmark."""
    lost = forgetting(scores, learned)
    gained, kept, drops = gain(scores, learned), retention(scores, learned), general_drop(general)
    return ForgettingSummary(
        acc=acc(scores, learned),
        bwt=bwt(scores, learned),
        fwt=fwt(scores, learned),
        forgetting_mean=_mean(lost.values()),
        forgetting_worst=_worst(lost.values()),
        gain_mean=_mean(gained.values()),
        retention_mean=_mean(kept.values()),
        general_drop_mean=_mean(drops.values()),
        skills={
            skill: SkillForgetting(
                base=scores[0].get(skill),
                when_learned=scores[k].get(skill),
                now=scores[-1].get(skill),
                gain=gained[skill],
                forgetting=lost.get(skill),
                retention=kept[skill],
            )
            for skill, k in learned.items()
        },
        general_drop=drops,
    )


def acc(scores: Scores, learned: Learned) -> float | None:
    """Mean last score over learned skills."""
    return _mean(scores[-1].get(skill) for skill in learned)


def bwt(scores: Scores, learned: Learned) -> float | None:
    """Backward transfer: mean of R[T] - R[k_s] over the skills learned before the last version (the
    paper's divisor; GEM's code counts the last skill's 0 too)."""
    return _mean(
        _minus(scores[-1].get(skill), scores[k].get(skill)) for skill, k in _earlier(scores, learned)
    )


def fwt(scores: Scores, learned: Learned) -> float | None:
    """Forward transfer: mean of R[k_s - 1] - R[0] over the skills learned after the first version (the
    paper's divisor: for a skill of the first version the term is 0 by definition)."""
    return _mean(
        _minus(scores[k - 1].get(skill), scores[0].get(skill)) for skill, k in learned.items() if k > 1
    )


def forgetting(scores: Scores, learned: Learned) -> dict[str, float | None]:
    """Chaudhry's: best measured score in k_s <= l < T, minus the last; skills learned before T."""
    found: dict[str, float | None] = {}
    for skill, k in _earlier(scores, learned):
        before = [value for row in scores[k:-1] if (value := row.get(skill)) is not None]
        found[skill] = _minus(max(before, default=None), scores[-1].get(skill))
    return found


def gain(scores: Scores, learned: Learned) -> dict[str, float | None]:
    """Learning gain R[k_s] - R[0]."""
    return {skill: _minus(scores[k].get(skill), scores[0].get(skill)) for skill, k in learned.items()}


def retention(scores: Scores, learned: Learned) -> dict[str, float | None]:
    """R[T] / R[k_s]; None where R[k_s] is 0."""
    found: dict[str, float | None] = {}
    for skill, k in learned.items():
        now, then = scores[-1].get(skill), scores[k].get(skill)
        found[skill] = None if now is None or not then else now / then
    return found


def general_drop(general: Scores) -> dict[str, float | None]:
    """R[0] - R[T] for every general benchmark that either was measured on; positive is a loss."""
    names = sorted({*general[0], *general[-1]}) if general else []
    return {name: _minus(general[0].get(name), general[-1].get(name)) for name in names}


def _earlier(scores: Scores, learned: Learned) -> list[tuple[str, int]]:
    return [(skill, k) for skill, k in learned.items() if k < len(scores) - 1]


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _mean(values: Iterable[float | None]) -> float | None:
    found: list[float] = []
    for value in values:
        if value is None:
            return None
        found.append(value)
    return sum(found) / len(found) if found else None


def _worst(values: Iterable[float | None]) -> float | None:
    """The largest loss; None when one of them is unknown, since that one may be the worst."""
    known = list(values)
    return None if None in known or not known else max(value for value in known if value is not None)
