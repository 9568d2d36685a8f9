"""Skill x version scores as a heatmap: blank where unmeasured, never 0."""

from collections.abc import Mapping, Sequence

from api.dashboard.contexts import Matrix, MatrixCell, MatrixColumn, MatrixRow, NotServing, Pill
from api.dashboard.drawing import heat
from api.dashboard.links import anchor, assistant_url, suite_url, version_link
from api.dashboard.serving_view import OUTCOME_TONES, OUTCOME_WORDS
from api.dashboard.text import percent
from domain.measurement import SuiteKind, Verdict
from evaluation.benchmarks import LIKELIHOOD, ORDINARY
from registry.measurements import MatrixRow as Measured
from registry.tables import Version

NEWEST_COLUMNS = 12
"""Beside v0 and the champion, unless all are asked for."""
_NOTES = {
    LIKELIHOOD: "probability given to right answers",
    ORDINARY: "ordinary prompts, ordinary answers",
}


def matrix(
    assistant: str,
    versions: Sequence[Version],
    measured: Sequence[Measured],
    *,
    taught: Mapping[int, Sequence[str]],
    skills: Sequence[str],
    champion_id: str,
    hidden: int,
) -> Matrix:
    """`versions` and `skills` in their order of appearance; `taught` are the skills that the
    versions' own updates taught, by number; `hidden` more versions are not among them."""
    taught_cells = {("skill", suite, number) for number, suites in taught.items() for suite in suites}
    found = {(one.kind, one.suite, one.version): one for one in measured}
    measured_skills = {one.suite for one in measured if one.kind == "skill"}
    general = {one.suite for one in measured if one.kind == "general"}
    benchmarks = sorted(general, key=lambda suite: (suite in _NOTES, suite))

    def row(kind: SuiteKind, suite: str) -> MatrixRow:
        return MatrixRow(
            name=suite,
            note=_NOTES.get(suite, "") if kind == "general" else "",
            cells=[
                _cell(
                    assistant,
                    version,
                    found.get((kind, suite, version.number)),
                    suite,
                    taught=(kind, suite, version.number) in taught_cells,
                )
                for version in versions
            ],
        )

    return Matrix(
        columns=[_column(assistant, version, champion_id) for version in versions],
        skills=[row("skill", suite) for suite in skills if suite in measured_skills],
        general=[row("general", suite) for suite in benchmarks],
        not_serving=[
            _not_serving(assistant, version) for version in versions if _outcome(version) in ("block", "hold")
        ],
        hidden=hidden,
        all_url=f"{assistant_url(assistant)}?versions=all",
    )


def verdict_of(version: Version) -> Verdict | None:
    return Verdict.model_validate(version.verdict) if version.verdict is not None else None


def _outcome(version: Version) -> str | None:
    verdict = verdict_of(version)
    return verdict.outcome if verdict is not None else None


def version_pills(version: Version, champion_id: str) -> list[Pill]:
    outcome = _outcome(version)
    pills = [Pill("champion", "accent")] if version.id == champion_id else []
    if outcome in ("block", "hold"):
        pills.append(Pill(OUTCOME_WORDS[outcome], OUTCOME_TONES[outcome]))
    return pills


def _column(assistant: str, version: Version, champion_id: str) -> MatrixColumn:
    return MatrixColumn(
        number=version.number,
        link=version_link(assistant, version.number),
        champion=version.id == champion_id,
        unused=_outcome(version) in ("block", "hold"),
        marks=version_pills(version, champion_id),
    )


def _cell(
    assistant: str, version: Version, measured: Measured | None, suite: str, *, taught: bool
) -> MatrixCell:
    unused = _outcome(version) in ("block", "hold")
    if measured is None:
        return MatrixCell(
            score=None,
            interval="",
            title=f"v{version.number} on {suite}: not measured",
            url="",
            heat=0,
            low=0.0,
            high=0.0,
            dot=0.0,
            taught=False,
            unused=unused,
        )
    return MatrixCell(
        score=percent(measured.score),
        interval=f"{measured.low * 100:.0f}–{measured.high * 100:.0f} · n {measured.n}",
        title=(
            f"v{version.number} on {suite}: {measured.score:.3f} over {measured.n} items, "
            f"95% interval {measured.low:.3f} to {measured.high:.3f}"
            + ("; taught by this version's update" if taught else "")
        ),
        url=suite_url(assistant, version.number, anchor(measured.kind, suite)),
        heat=heat(measured.score),
        low=round(measured.low * 100, 1),
        high=round(measured.high * 100, 1),
        dot=round(measured.score * 100, 1),
        taught=taught,
        unused=unused,
    )


def _not_serving(assistant: str, version: Version) -> NotServing:
    verdict = verdict_of(version)
    assert verdict is not None
    return NotServing(
        link=version_link(assistant, version.number),
        pill=Pill(OUTCOME_WORDS[verdict.outcome], OUTCOME_TONES[verdict.outcome]),
        reasons=verdict.reasons,
    )
