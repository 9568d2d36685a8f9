"""The gate's rules, each side of each threshold; intervals as in test_statistics."""

import pytest

from domain.measurement import GateRules, ItemScore, Measurement, SuiteKind
from evaluation.gate import decide

RULES = GateRules()


def measured(suite: str, scores: list[float], kind: SuiteKind = "skill", first: int = 0) -> Measurement:
    items = [
        ItemScore(item=f"{suite}:{first + at}", prompt="p", output="o", expected="e", score=score)
        for at, score in enumerate(scores)
    ]
    mean = sum(scores) / len(scores) if scores else 0.0
    return Measurement(kind=kind, suite=suite, score=mean, n=len(scores), low=0, high=1, items=items)


def ones(right: int, n: int) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


def general(right: int = 80, n: int = 120, probability: float = 0.6) -> list[Measurement]:
    return [
        measured("commonsense", ones(right, n), "general"),
        measured("likelihood", [probability + (0.05 if at % 2 else -0.05) for at in range(n)], "general"),
        measured("ordinary", ones(30, 30), "general"),
    ]


def taught(before: list[float], after: list[float], rules: GateRules = RULES) -> tuple[str, list[str]]:
    verdict = decide(
        rules,
        ["refund_route"],
        [measured("refund_route", after), *general()],
        [measured("refund_route", before), *general()],
    )
    return verdict.outcome, verdict.reasons


def kept(before: list[float], after: list[float]) -> tuple[str, list[str]]:
    new = [measured("new", ones(20, 20)), measured("refund_route", after), *general()]
    old = [measured("new", ones(0, 20)), measured("refund_route", before), *general()]
    verdict = decide(RULES, ["new"], new, old)
    return verdict.outcome, verdict.reasons


@pytest.mark.parametrize(
    ("before", "after", "n", "outcome"),
    [
        (0, 16, 20, "pass"),
        (0, 6, 20, "pass"),
        (12, 14, 20, "hold"),
        (0, 1, 20, "hold"),
        (0, 50, 60, "pass"),
        (10, 10, 20, "block"),
        (10, 4, 20, "block"),
        (0, 0, 60, "block"),
        # 200 items, 2 gained: the interval, at most +0.034, lies below the +0.05 that is asked.
        (0, 2, 200, "block"),
    ],
)
def test_a_taught_skill_must_gain(before: int, after: int, n: int, outcome: str) -> None:
    assert taught(ones(before, n), ones(after, n))[0] == outcome


@pytest.mark.parametrize(
    ("before", "after", "outcome"), [(20, 20, "pass"), (19, 19, "pass"), (20, 18, "hold"), (20, 8, "block")]
)
def test_a_mastered_skill_must_stay_mastered(before: int, after: int, outcome: str) -> None:
    assert taught(ones(before, 20), ones(after, 20))[0] == outcome


@pytest.mark.parametrize(
    ("asked", "before", "after", "outcome"),
    [
        (0.5, 12, 10, "block"),
        (0.6, 12, 8, "block"),
        (1.0, 20, 0, "block"),
        (0.5, 19, 18, "pass"),
        (0.5, 19, 17, "hold"),
        # What is left to gain is 0.40.
        (0.5, 12, 20, "pass"),
        (0.5, 12, 19, "hold"),
    ],
)
def test_a_larger_demand_lets_no_skill_fall(asked: float, before: int, after: int, outcome: str) -> None:
    assert taught(ones(before, 20), ones(after, 20), GateRules(min_gain=asked))[0] == outcome


def test_no_gain_asked_needs_no_proof() -> None:
    assert taught(ones(5, 20), ones(5, 20), GateRules(min_gain=0))[0] == "pass"
    assert taught(ones(5, 20), ones(1, 20), GateRules(min_gain=-1))[0] == "pass"
    assert taught(ones(15, 20), ones(1, 20), GateRules(min_gain=0))[0] == "block"


@pytest.mark.parametrize(
    ("before", "after", "n", "outcome"),
    [
        (18, 18, 20, "pass"),
        (18, 16, 20, "pass"),
        (18, 15, 20, "hold"),
        (18, 10, 20, "block"),
        (55, 50, 60, "pass"),
        (55, 43, 60, "block"),
    ],
)
def test_an_earlier_skill_must_be_kept(before: int, after: int, n: int, outcome: str) -> None:
    assert kept(ones(before, n), ones(after, n))[0] == outcome


def test_reasons_are_written_for_people() -> None:
    # b = 13 of 60 lost: mean -13/60; interval from 0.0 x 47, -1 x 13, +1, -1.
    outcome, reasons = kept(ones(55, 60), ones(42, 60))
    assert outcome == "block"
    assert reasons == [
        "skill 'refund_route' fell from 0.92 to 0.70 (-0.22, 95% interval -0.32 to -0.10); "
        "at most 0.10 is allowed"
    ]


def test_a_pass_says_what_was_seen() -> None:
    outcome, reasons = taught(ones(0, 20), ones(16, 20))
    assert outcome == "pass"
    assert reasons == [
        "skill 'refund_route' rose from 0.00 to 0.80 (+0.80, 95% interval +0.50 to +0.96); "
        "at least +0.05 is asked",
        "general ability stayed at 0.67 (+0.00, 95% interval -0.02 to +0.02), probability of the right "
        "answers +0.00, 95% interval +0.00 to +0.00; at most 0.03 may be lost",
        "0 of 30 ordinary prompts were answered in a taught skill's format; at most 2% is allowed",
    ]


SKILL = (measured("s", ones(0, 20)), measured("s", ones(20, 20)))


def with_general(new: list[Measurement], old: list[Measurement]) -> str:
    return decide(RULES, ["s"], [SKILL[1], *new], [SKILL[0], *old]).outcome


def test_general_ability_is_judged_three_ways() -> None:
    assert with_general(general(), general()) == "pass"
    # 25 of 120 lost: the interval lies below -0.03.
    assert with_general(general(right=55), general()) == "block"
    # 6 of 120 lost: -0.05 is more than may be lost, but within chance of it.
    assert with_general(general(right=74), general()) == "hold"
    # 2 of 120 lost: accuracy cannot prove it, the likelihood can ...
    assert with_general(general(right=78), general()) == "pass"
    # ... unless it fell itself: enough to block alone, or is not there at all.
    assert with_general(general(right=78, probability=0.5), general()) == "block"
    assert with_general([m for m in general(right=78) if m.suite != "likelihood"], general()) == "hold"


def test_a_fall_of_accuracy_that_may_be_chance_leans_on_the_likelihood() -> None:
    """7 of 120 lost and 3 gained: -0.033, 95% interval -0.09 to +0.02. An unchanged version of which 10
    answers flip either way falls that far in one case of six."""
    flipped = [0.0] * 7 + [1.0] * 76 + [0.0] * 37
    accuracy = measured("commonsense", flipped, "general")
    assert with_general([accuracy, *general()[1:]], general()) == "pass"
    assert with_general([accuracy, *general(probability=0.58)[1:]], general()) == "pass"
    assert with_general([accuracy, *general(probability=0.56)[1:]], general()) == "block"
    assert with_general([accuracy, general()[2]], [general()[0], general()[2]]) == "hold"


def test_better_general_ability_passes() -> None:
    assert with_general(general(right=100), general()) == "pass"


def test_a_leak_blocks() -> None:
    leaking = [*general()[:2], measured("ordinary", ones(29, 30), "general")]
    verdict = decide(RULES, ["s"], [SKILL[1], *leaking], [SKILL[0], *general()])
    assert verdict.outcome == "block"
    assert verdict.reasons == [
        "1 of 30 ordinary prompts were answered in a taught skill's format, as 'p' -> 'o'; "
        "at most 2% is allowed"
    ]
    tolerant = GateRules(max_leak=0.04)
    assert decide(tolerant, ["s"], [SKILL[1], *leaking], [SKILL[0], *general()]).outcome == "pass"


@pytest.mark.parametrize(
    ("suite", "side"),
    [
        ("s", "candidate"),
        ("s", "parent"),
        ("commonsense", "candidate"),
        ("commonsense", "parent"),
        ("ordinary", "candidate"),
    ],
)
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_what_was_not_measured_never_passes(suite: str, side: str, how: str) -> None:
    new, old = [SKILL[1], *general()], [SKILL[0], *general()]
    spoiled = new if side == "candidate" else old
    at = next(at for at, measurement in enumerate(spoiled) if measurement.suite == suite)
    if how == "missing":
        del spoiled[at]
    else:
        spoiled[at] = measured(suite, [], spoiled[at].kind)
    assert decide(RULES, ["s"], new, old).outcome == "hold"


def test_nothing_at_all_holds() -> None:
    verdict = decide(RULES, ["s"], [], [])
    assert verdict.outcome == "hold"
    assert len(verdict.reasons) == 3
    assert decide(RULES, [], general(), general()).outcome == "hold"


def test_an_earlier_skill_that_nobody_measured_holds() -> None:
    verdict = decide(RULES, ["s"], [SKILL[1], *general()], [SKILL[0], *general()], earlier=["old"])
    assert verdict.outcome == "hold"
    assert verdict.reasons == ["skill 'old' was not measured on the candidate"]


def test_other_items_or_too_few_hold() -> None:
    other = measured("s", ones(20, 20), first=1)
    verdict = decide(RULES, ["s"], [other, *general()], [SKILL[0], *general()])
    assert verdict.reasons == ["skill 's' was not measured on the same items before and after"]
    few = decide(
        RULES, ["s"], [measured("s", ones(4, 4)), *general()], [measured("s", ones(0, 4)), *general()]
    )
    assert few.outcome == "hold"


def test_block_outranks_hold() -> None:
    verdict = decide(RULES, ["s", "unseen"], [SKILL[0], *general()], [SKILL[1], *general()])
    assert verdict.outcome == "block"
    assert [check.outcome for check in verdict.checks] == ["block", "hold", "pass", "pass"]
    assert len(verdict.reasons) == 2
