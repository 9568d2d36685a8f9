"""One update: stage, progress, loss, verdict and events."""

from collections.abc import Sequence

from pydantic import BaseModel

from api.dashboard.contexts import (
    CheckRow,
    EventRow,
    Field,
    PhaseState,
    PhaseStep,
    Pill,
    Progress,
    Tile,
    Tone,
    UpdateCard,
    UpdatePage,
    VersionLink,
)
from api.dashboard.drawing import curve
from api.dashboard.links import crumbs, update_url
from api.dashboard.serving_view import OUTCOME_TONES, OUTCOME_WORDS, STATUS_TONES
from api.dashboard.text import duration, moment, percent, plural, points
from domain.measurement import Check, GateRules, Verdict
from domain.recipe import Recipe
from domain.training import StepLine
from domain.update import FINISHED, Phase, Status
from registry.paging import Page
from registry.tables import Event, Update

_LEVEL_TONES: dict[str, Tone] = {"info": "plain", "warning": "warn", "error": "bad"}
_PHASES = list(Phase)


def step_lines(metrics: Sequence[Event]) -> list[StepLine]:
    """The training steps among an update's metrics events, in order.

    A resumed training repeats steps behind its checkpoint: the later line of a step counts.
    """
    lines = (StepLine.model_validate(event.data) for event in metrics if event.data.get("type") == "step")
    by_step = {line.step: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def update_card(
    update: Update,
    steps: Sequence[StepLine],
    *,
    assistant: str,
    parent: VersionLink | None,
    version: VersionLink | None,
    now: float,
) -> UpdateCard:
    status = Status(update.status)
    verdict = Verdict.model_validate(update.verdict) if update.verdict is not None else None
    took = None
    if update.started_at is not None and update.finished_at is not None:
        took = duration(update.finished_at - update.started_at)
    recipe = Recipe.model_validate(update.recipe)
    return UpdateCard(
        id=update.id,
        url=update_url(assistant, update.id),
        skills=[str(skill) for skill in update.skills],
        method=f"{recipe.method.upper()}, "
        + (f"LoRA rank {recipe.lora_rank}" if recipe.lora_rank else "all weights"),
        status=Pill(status.value, STATUS_TONES[status]),
        verdict=_verdict_pill(verdict) if verdict is not None else None,
        parent=parent,
        version=version,
        phases=_phases(update, status),
        progress=_progress(steps[-1], status) if steps else None,
        curve=curve([(line.step, line.loss) for line in steps], "training loss"),
        reasons=verdict.reasons if verdict is not None and verdict.outcome != "pass" else [],
        error=f"{update.error['message']} ({update.error['code']})" if update.error is not None else None,
        at=moment(update.created_at, now),
        took=took,
        finished=status in FINISHED,
    )


def update_page(
    update: Update,
    card: UpdateCard,
    messages: Page[Event],
    *,
    assistant: str,
    demonstrations: int,
    now: float,
) -> UpdatePage:
    """`messages` are the newest events, newest first."""
    verdict = Verdict.model_validate(update.verdict) if update.verdict is not None else None
    return UpdatePage(
        title=f"Update of {', '.join(card.skills)}",
        crumbs=crumbs(assistant, "update"),
        url=card.url,
        card=card,
        checks=check_rows(verdict.checks) if verdict is not None else [],
        recipe=fields(Recipe.model_validate(update.recipe)),
        gate=fields(GateRules.model_validate(update.gate)),
        publish=update.publish,
        demonstrations=plural(demonstrations, "demonstration"),
        events=[_event_row(event, now) for event in messages.rows],
        older_events=messages.has_more,
    )


def check_rows(checks: Sequence[Check]) -> list[CheckRow]:
    """Failed checks first."""
    order = {"block": 0, "hold": 1, "pass": 2}
    return [
        CheckRow(
            rule=check.rule.replace("_", " "),
            suite=check.suite,
            outcome=Pill(OUTCOME_WORDS[check.outcome], OUTCOME_TONES[check.outcome]),
            parent="" if check.parent is None else percent(check.parent),
            candidate="" if check.candidate is None else percent(check.candidate),
            change="" if check.change is None else points(check.change),
            interval=""
            if check.low is None or check.high is None
            else f"{points(check.low)} to {points(check.high)}",
            reason=check.reason,
        )
        for check in sorted(checks, key=lambda check: order[check.outcome])
    ]


def fields(shape: BaseModel) -> list[Field]:
    return [
        Field(name, "none" if value is None else str(value))
        for name, value in shape.model_dump(mode="json").items()
    ]


def _verdict_pill(verdict: Verdict) -> Pill:
    return Pill(OUTCOME_WORDS[verdict.outcome], OUTCOME_TONES[verdict.outcome])


def _phases(update: Update, status: Status) -> list[PhaseStep]:
    """What is done, under way and ahead, or where the update stopped."""
    if status is Status.SUCCEEDED:
        return [PhaseStep(phase.value, "done") for phase in _PHASES]
    if update.phase is None:
        return []
    at = _PHASES.index(Phase(update.phase))
    here: PhaseState = "now" if status is Status.RUNNING else "stopped" if status in FINISHED else "ahead"
    return [
        PhaseStep(phase.value, "done" if index < at else "ahead" if index > at else here)
        for index, phase in enumerate(_PHASES)
    ]


def _progress(line: StepLine, status: Status) -> Progress:
    running = status is Status.RUNNING and line.step < line.steps
    nats = [
        (label, value)
        for label, value in (("Teacher KL", line.teacher_kl), ("Entropy", line.entropy))
        if value is not None
    ]
    figures = [
        *(Tile(label, f"{value:.3g}", "plain", "nats per token") for label, value in nats),
        Tile(
            "Response",
            f"{line.response_tokens:.0f}",
            "plain",
            f"tokens, {percent(line.truncated_share)} cut off",
        ),
        Tile("Gradient norm", f"{line.grad_norm:.3g}", "plain", f"learning rate {line.learning_rate:.2g}"),
    ]
    if line.rehearsal_kl is not None:
        figures.insert(1, Tile("Rehearsal KL", f"{line.rehearsal_kl:.3g}", "plain", "nats per token"))
    return Progress(
        step=line.step,
        steps=line.steps,
        eta=f"about {duration(line.eta_seconds)} left" if running else "",
        figures=figures,
    )


def _event_row(event: Event, now: float) -> EventRow:
    return EventRow(moment(event.created_at, now), event.type, _LEVEL_TONES[event.level], event.message)
