"""May a candidate serve? Rules over its measurements and its parent's. Pure.

learned, each taught skill: pass when it gains at least min_gain and the gain's interval lies above 0;
    block when it does not gain, or the interval lies below min_gain; else hold. A skill that the parent
    answers at 1 - min_gain or better, and at MASTERED, has nothing to gain and must stay there; where less
    than min_gain is left to gain below that, all of it is asked.
kept, each earlier skill: pass when it loses at most max_forgetting; block when it loses more and the
    interval lies below 0; hold when it loses more but that may be chance.
general, all benchmarks pooled: pass when shown to lose at most max_general_drop, by accuracy or, where
    accuracy fell by no more or maybe by chance, by the probability of the right answers; block when either
    is shown to lose more, else hold (non-inferiority).
leak, ordinary prompts: block when more than max_leak of them are answered in a taught skill's format.

Intervals are of the paired change on identical items, at `rules.confidence`. What was not measured, or
not on the same items, or on fewer than MIN_ITEMS, holds: nothing passes unseen. Block outranks hold.
docs/decisions/0003-gate.md says why.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from domain.measurement import Check, GateRules, Measurement, Outcome, Verdict
from domain.paired import Difference, cautious_difference, paired_difference
from evaluation.benchmarks import LIKELIHOOD, ORDINARY

MIN_ITEMS = 5
"""Below it not even an unchanged score says anything."""
MASTERED = 0.9
"""From here on a taught skill may have little left to gain, whatever gain is asked."""
TOLERANCE = 1e-9
"""0.92 - 0.82 is a gain of 0.10, whatever floating point says."""


@dataclass(frozen=True)
class _Pair:
    """Candidate and parent on the same items."""

    old: float
    new: float
    change: Difference
    confidence: float
    n: int

    def words(self, subject: str) -> str:
        move = (
            "stayed at" if abs(self.change.mean) < TOLERANCE else "rose" if self.change.mean > 0 else "fell"
        )
        path = f"{self.new:.2f}" if move == "stayed at" else f"from {self.old:.2f} to {self.new:.2f}"
        return f"{subject} {move} {path} ({self.interval()})"

    def interval(self) -> str:
        low, high = self.change.low, self.change.high
        return f"{self.change.mean:+z.2f}, {self.confidence:.0%} interval {low:+z.2f} to {high:+z.2f}"


def decide(
    rules: GateRules,
    taught: Sequence[str],
    candidate: Sequence[Measurement],
    parent: Sequence[Measurement],
    earlier: Collection[str] = (),
) -> Verdict:
    """Verdict on the candidate. `taught` names this update's skills; `earlier` those of the lineage, which
    must be measured too (every other skill in either list of measurements is checked in any case)."""
    new, old = _by_suite(candidate, "skill"), _by_suite(parent, "skill")
    kept = sorted({*new, *old, *earlier} - set(taught))
    checks = [
        *(_learned(rules, name, new.get(name), old.get(name)) for name in taught),
        *(_kept(rules, name, new.get(name), old.get(name)) for name in kept),
        _general(rules, _by_suite(candidate, "general"), _by_suite(parent, "general")),
        _leak(
            rules, _by_suite(candidate, "general").get(ORDINARY), _by_suite(parent, "general").get(ORDINARY)
        ),
    ]
    if not taught:
        checks.append(_unseen("learned", "", "the update teaches no skill, so there is no gain to show"))
    outcomes: set[Outcome] = {check.outcome for check in checks}
    outcome: Outcome = "block" if "block" in outcomes else "hold" if "hold" in outcomes else "pass"
    shown: dict[Outcome, Sequence[Outcome]] = {
        "block": ("block", "hold"),
        "hold": ("hold",),
        "pass": ("pass",),
    }
    reasons = [check.reason for wanted in shown[outcome] for check in checks if check.outcome == wanted]
    return Verdict(outcome=outcome, reasons=reasons, checks=checks)


def _learned(rules: GateRules, name: str, new: Measurement | None, old: Measurement | None) -> Check:
    pair = _pair(rules, [(new, old)])
    if isinstance(pair, str):
        return _unseen("learned", name, f"skill '{name}' {pair}")
    words = pair.words(f"skill '{name}'")
    change, asked = pair.change, rules.min_gain
    least = max(1 - asked, MASTERED)
    if asked > 0 and pair.old >= least - TOLERANCE:
        # Nothing to gain: a second batch for a mastered skill must keep it mastered.
        if pair.new >= least - TOLERANCE:
            return _check("learned", name, "pass", pair, f"{words}; it was learned already and is kept")
        outcome: Outcome = "block" if change.high < 0 else "hold"
        return _check("learned", name, outcome, pair, f"{words}; it must stay at {least:.2f} or above")
    asked = min(asked, 1 - pair.old)  # more there is not
    demand = f"at least {asked:+.2f} is asked"
    if change.mean >= asked - TOLERANCE:
        if asked <= 0 or change.low > 0:
            return _check("learned", name, "pass", pair, f"{words}; {demand}")
        return _check("learned", name, "hold", pair, f"{words}; {demand}, and {_chance(pair.n)}")
    if change.mean <= 0 or change.high < asked:
        return _check("learned", name, "block", pair, f"{words}; {demand}")
    return _check("learned", name, "hold", pair, f"{words}; {demand}, and {_chance(pair.n)}")


def _kept(rules: GateRules, name: str, new: Measurement | None, old: Measurement | None) -> Check:
    pair = _pair(rules, [(new, old)])
    if isinstance(pair, str):
        return _unseen("kept", name, f"skill '{name}' {pair}")
    words = pair.words(f"skill '{name}'") + f"; at most {rules.max_forgetting:.2f} is allowed"
    if pair.change.mean >= -rules.max_forgetting - TOLERANCE:
        return _check("kept", name, "pass", pair, words)
    if pair.change.high < 0:
        return _check("kept", name, "block", pair, words)
    return _check("kept", name, "hold", pair, f"{words}, and {_chance(pair.n)}")


def _general(rules: GateRules, new: Mapping[str, Measurement], old: Mapping[str, Measurement]) -> Check:
    """Non-inferiority on accuracy; a small suite cannot show it, so where accuracy did not fall, or its fall
    may be chance, it may lean on the probability of the right answers, which the same items measure far more
    finely."""
    benchmarks = sorted({*new, *old} - {ORDINARY, LIKELIHOOD})
    pair = _pair(rules, [(new.get(name), old.get(name)) for name in benchmarks])
    if isinstance(pair, str):
        return _unseen("general", "pooled", f"general ability {pair}")
    fine = _pair(rules, [(new.get(LIKELIHOOD), old.get(LIKELIHOOD))], continuous=True)
    margin = rules.max_general_drop
    words = pair.words("general ability")
    if not isinstance(fine, str):
        words += f", probability of the right answers {fine.interval()}"
    words += f"; at most {margin:.2f} may be lost"
    changes = [pair.change] if isinstance(fine, str) else [pair.change, fine.change]
    if any(change.high < -margin - TOLERANCE for change in changes):
        return _check("general", "pooled", "block", pair, words)
    kept = pair.change.mean >= -margin - TOLERANCE
    may_be_chance = pair.change.high >= 0
    if (kept or may_be_chance) and any(change.low >= -margin - TOLERANCE for change in changes):
        return _check("general", "pooled", "pass", pair, words)
    return _check("general", "pooled", "hold", pair, f"{words}, and {_chance(pair.n)}")


def _leak(rules: GateRules, new: Measurement | None, old: Measurement | None) -> Check:
    if new is None or new.n < MIN_ITEMS or new.n != len(new.items):
        return _unseen("leak", ORDINARY, "answers to ordinary prompts were not measured")
    share = 1 - sum(item.score for item in new.items) / new.n
    leaking = [item for item in new.items if item.score < 1]
    reason = f"{len(leaking)} of {new.n} ordinary prompts were answered in a taught skill's format"
    if leaking:
        reason += f", as '{_short(leaking[0].prompt)}' -> '{_short(leaking[0].output)}'"
    return Check(
        rule="leak",
        suite=ORDINARY,
        outcome="pass" if share <= rules.max_leak + TOLERANCE else "block",
        parent=old.score if old is not None and old.n else None,
        candidate=new.score,
        change=None,
        low=None,
        high=None,
        reason=f"{reason}; at most {rules.max_leak:.0%} is allowed",
    )


def _pair(
    rules: GateRules,
    suites: Sequence[tuple[Measurement | None, Measurement | None]],
    *,
    continuous: bool = False,
) -> _Pair | str:
    """Both versions on all items of the suites, or why they can't be compared."""
    before: list[float] = []
    after: list[float] = []
    for new, old in suites:
        if new is None or not new.items:
            return "was not measured on the candidate"
        if old is None or not old.items:
            return "was not measured on the parent"
        scores = {item.item: item.score for item in old.items}
        if scores.keys() != {item.item for item in new.items} or len(scores) != len(new.items):
            return "was not measured on the same items before and after"
        before += [scores[item.item] for item in new.items]
        after += [item.score for item in new.items]
    if not after:
        return "was not measured"
    if len(after) < MIN_ITEMS:
        return f"was measured on {len(after)} items only; at least {MIN_ITEMS} are needed"
    differences = [b - a for a, b in zip(before, after, strict=True)]
    # Scores of 0 and 1 can agree by luck on every item; finer ones can't.
    interval = paired_difference if continuous else cautious_difference
    return _Pair(
        old=sum(before) / len(before),
        new=sum(after) / len(after),
        change=interval(differences, rules.confidence),
        confidence=rules.confidence,
        n=len(after),
    )


def _by_suite(measurements: Iterable[Measurement], kind: str) -> dict[str, Measurement]:
    return {measured.suite: measured for measured in measurements if measured.kind == kind}


def _check(rule: str, suite: str, outcome: Outcome, pair: _Pair, reason: str) -> Check:
    return Check(
        rule=rule,
        suite=suite,
        outcome=outcome,
        parent=pair.old,
        candidate=pair.new,
        change=pair.change.mean,
        low=pair.change.low,
        high=pair.change.high,
        reason=reason,
    )


def _unseen(rule: str, suite: str, reason: str) -> Check:
    return Check(
        rule=rule,
        suite=suite,
        outcome="hold",
        parent=None,
        candidate=None,
        change=None,
        low=None,
        high=None,
        reason=reason,
    )


def _chance(n: int) -> str:
    return f"on {n} items this may be chance: more held-out items would tell, or promote it by hand"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"
