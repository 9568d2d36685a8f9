"""Lines of a study from plain score rows."""

from collections.abc import Mapping, Sequence

from benchmarks.study import BASE, Key, Role, StageResult, TrainingFigures

TRAINING = TrainingFigures(
    steps=10,
    seconds=30.0,
    student_score=0.0,
    teacher_score=1.0,
    teacher_kl=0.1,
    rehearsal_kl=None,
    response_tokens=5.0,
)


def items(suite: str, right: int, of: int) -> dict[str, float]:
    """`of` items, the first `right` of them answered."""
    return {f"{suite}-{number}": float(number < right) for number in range(of)}


def line(
    arm: str,
    stage: int,
    skills: Mapping[str, float],
    general: Mapping[str, float] | None = None,
    *,
    role: Role | None = None,
    seed: int = 0,
    of: int = 100,
    kl: float = 0.0,
    passes: Mapping[str, int] | None = None,
) -> StageResult:
    """A version whose skills and benchmarks have these shares of `of` items right."""
    return StageResult(
        arm=arm,
        seed=seed,
        stage=stage,
        role=role,
        changes={},
        training=TRAINING if stage else None,
        skills={skill: items(skill, round(share * of), of) for skill, share in skills.items()},
        outputs={},
        answer_tokens=dict.fromkeys(skills, 4.0),
        dev=items("dev", 9, 10) if stage else {},
        general={name: items(name, round(share * of), of) for name, share in (general or {}).items()},
        ordinary={"ordinary:1": 1.0},
        ordinary_outputs={},
        kl_to_base={"ordinary:1": kl},
        passes={skill: {f"{skill}-0": count} for skill, count in (passes or {}).items()},
        seconds={},
    )


def lineage(
    arm: str,
    role: Role,
    rows: Sequence[Mapping[str, float]],
    general: Sequence[Mapping[str, float]] | None = None,
    *,
    seed: int = 0,
    of: int = 100,
) -> dict[Key, StageResult]:
    """Row 0 is the base; row k the version after stage k. `general` is (base, every later version)."""
    base, later = general or ({}, {})
    found = {(BASE, 0, 0): line(BASE, 0, rows[0], base, of=of)}
    for stage, row in enumerate(rows[1:], start=1):
        found[arm, seed, stage] = line(arm, stage, row, later, role=role, seed=seed, of=of)
    return found
