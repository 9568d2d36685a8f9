"""A study's figures as a page and plots."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from pydantic import JsonValue

from benchmarks.bootstrap import Estimate
from benchmarks.continual_metrics import ArmFigures, Comparison, Figures
from benchmarks.lineages import lineages_of, score_rows
from benchmarks.study import PASS_KS, Study

PAGE = "report.md"
OVER_STAGES = "accuracy.svg"
TRADE_OFF = "forgetting.svg"
COLUMNS = (
    ("ACC", "acc"),
    ("new skill", "new_skill_score"),
    ("BWT", "bwt"),
    ("forgetting", "forgetting"),
    ("worst", "forgetting_worst"),
    ("general drop", "general_drop"),
    ("likelihood drop", "likelihood_drop"),
    ("KL to base", "kl_to_base"),
)


def summary(figures: Figures) -> dict[str, JsonValue]:
    """The benchmark's last line."""

    def plain(one: Comparison | None) -> JsonValue:
        if one is None:
            return None
        return {name: value._asdict() if isinstance(value, Estimate) else value for name, value in one}

    return {
        "arms": {name: arm.model_dump(mode="json") for name, arm in figures.arms.items()},
        "sdft_vs_sft": plain(figures.sdft_vs_sft),
        "comparisons": {name: plain(one) for name, one in figures.comparisons.items()},
    }


def write_report(study: Study, figures: Figures) -> Path:
    """Write the page and its plots into the study's folder; returns the page."""
    page = study.folder / PAGE
    skills = study.settings.skills
    parts = [_head(study)]
    if figures.arms:
        parts.append(_arms_table(figures))
    if figures.comparisons:
        parts.append(_comparisons_table(figures))
    if figures.arms:
        parts.append(_matrix(study, figures))
        if any(arm.pass_at_k for arm in figures.arms.values()):
            parts.append(_samples_table(figures))
        parts += [
            f"![Accuracy of each skill after each stage]({OVER_STAGES})",
            f"![New-skill score against forgetting]({TRADE_OFF})",
        ]
        # Ids in the file are hashed with this: the same figures give the same bytes.
        with plt.rc_context({"svg.hashsalt": "ratchet", "font.size": 9}):
            _plot_over_stages(study, figures, skills, study.folder / OVER_STAGES)
            _plot_trade_off(figures, study.folder / TRADE_OFF)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _head(study: Study) -> str:
    settings = study.settings
    steps = "as each recipe has it" if settings.steps is None else f"at most {settings.steps}"
    return (
        f"{' -> '.join(settings.skills)} on {settings.base_model}; {settings.eval_rows} eval rows a skill, "
        f"{settings.general_items} items a general benchmark, steps a stage {steps}. Brackets are 95% "
        "intervals, paired bootstrap over items and seeds: with one seed they tell of items only, and one "
        "of width 0 says that no item changed, not that none could. Drops, forgetting and KL: lower is "
        "better."
    )


def _arms_table(figures: Figures) -> str:
    rows = [
        [
            name,
            str(arm.stages),
            str(len(arm.seeds)),
            *(_with_interval(arm, field) for _, field in COLUMNS),
            f"{arm.ordinary_kept:.2f}",
            f"{arm.train_seconds:.0f}",
        ]
        for name, arm in figures.arms.items()
    ]
    headings = ["arm", "stages", "seeds", *(h for h, _ in COLUMNS), "ordinary kept", "s a stage"]
    return _table(headings, rows)


def _comparisons_table(figures: Figures) -> str:
    def row(name: str, one: Comparison) -> list[str]:
        headline = figures.sdft_vs_sft is not None and name == figures.sdft_vs_sft.against
        return [
            f"{one.arm} / {name}" + (" (best sft)" if headline else ""),
            f"{one.stages} x {len(one.seeds)}",
            _estimate(one.new_skill_difference, "+.3f"),
            *(
                f"{_estimate(value, '.2f')}; below half: {claim}"
                for value, claim in (
                    (one.forgetting_ratio, one.forgetting_below_half),
                    (one.general_drop_ratio, one.general_drop_below_half),
                    (one.likelihood_drop_ratio, one.likelihood_drop_below_half),
                )
            ),
        ]

    headings = ["pair", "stages x seeds", "new skill, difference", "forgetting, ratio"]
    headings += ["general drop, ratio", "likelihood drop, ratio"]
    return _table(headings, [row(name, one) for name, one in figures.comparisons.items()])


def _matrix(study: Study, figures: Figures) -> str:
    """Accuracy of every skill after every stage, mean over seeds."""
    skills = study.settings.skills
    rows = []
    for name, scores in _mean_scores(study, figures).items():
        for stage, row in enumerate(scores):
            after = skills[stage - 1] if stage else "base"
            rows.append([name, after, *(f"{row[skill]:.3f}" for skill in skills)])
    return _table(["arm", "after", *skills], rows)


def _samples_table(figures: Figures) -> str:
    rows = [
        [name, f"{arm.answer_tokens:.1f}", *(f"{arm.pass_at_k[k]:.2f}" for k in PASS_KS)]
        for name, arm in figures.arms.items()
        if arm.pass_at_k
    ]
    return _table(["arm", "answer tokens", *(f"pass@{k}" for k in PASS_KS)], rows)


def _mean_scores(study: Study, figures: Figures) -> dict[str, list[dict[str, float]]]:
    """By arm, R[t, s] averaged over its seeds."""
    skills, found = study.settings.skills, {}
    for name in figures.arms:
        lineages = [score_rows(lineage, skills) for lineage in lineages_of(study.results, name).values()]
        found[name] = [
            {skill: math.fsum(row[skill] for row in stage) / len(stage) for skill in skills}
            for stage in zip(*lineages, strict=True)
        ]
    return found


def _plot_over_stages(study: Study, figures: Figures, skills: Sequence[str], file: Path) -> None:
    figure, axes = plt.subplots(1, len(skills), figsize=(3.2 * len(skills), 3.2), sharey=True, squeeze=False)
    scores = _mean_scores(study, figures)
    for place, (skill, axis) in enumerate(zip(skills, axes[0], strict=True), start=1):
        for number, (name, rows) in enumerate(scores.items()):
            values = [row[skill] for row in rows]
            axis.plot(range(len(rows)), values, **_style(number), markersize=3, label=name)
        axis.axvline(place, color="0.8", linestyle=":", zorder=0)
        axis.set(title=skill, xlabel="stage (dotted: taught)", ylim=(-0.03, 1.03))
        axis.set_xticks(range(len(skills) + 1))
    axes[0][0].set_ylabel("accuracy")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.set_layout_engine("constrained")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _plot_trade_off(figures: Figures, file: Path) -> None:
    """Up and to the left is better. Arms without a figure on an axis have no point there."""
    panels = (("forgetting", "mean forgetting"), ("likelihood_drop", "drop of general likelihood"))
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 4), sharey=True)
    for axis, (field, heading) in zip(axes, panels, strict=True):
        for number, (name, arm) in enumerate(figures.arms.items()):
            x, y = getattr(arm, field), arm.new_skill_score
            if x is None or y is None:
                continue
            axis.errorbar(
                x,
                y,
                xerr=_error(x, arm.intervals[field]),
                yerr=_error(y, arm.intervals["new_skill_score"]),
                **_style(number),
                capsize=2,
                linewidth=0.8,
                label=name,
            )
        axis.set(xlabel=heading)
    axes[0].set_ylabel("new-skill score")
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.set_layout_engine("constrained")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _style(number: int) -> dict[str, Any]:
    """Colour and marker of one of the arms: different for the first sixty."""
    return {"color": plt.get_cmap("tab20")(number % 20), "marker": "osD"[number // 20 % 3]}


def _error(value: float, interval: tuple[float | None, float | None]) -> list[list[float]] | None:
    low, high = interval
    if low is None or high is None:
        return None
    # A resampled maximum lies above the observed one, so that an interval may miss its own figure.
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _with_interval(arm: ArmFigures, field: str) -> str:
    return _estimate(Estimate(getattr(arm, field), *arm.intervals[field]), ".3f")


def _estimate(estimate: Estimate, form: str) -> str:
    """`0.123 [0.100, 0.150]`; a dash for what is not defined."""
    value, low, high = ("-" if v is None else format(v, form) for v in estimate)
    return value if low == high == "-" else f"{value} [{low}, {high}]"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
