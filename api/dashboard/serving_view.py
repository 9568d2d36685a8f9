"""What answers for an assistant, against what its champion asks for."""

from urllib.parse import quote

from api.dashboard.contexts import AssistantRow, AssistantsPage, Notice, Pill, Serving, Tone
from api.dashboard.links import ROOT, assistant_url, crumbs, update_url, version_link
from api.dashboard.text import moment
from domain.update import Status
from registry.overview import AssistantOverview
from registry.tables import Update

STATUS_TONES: dict[Status, Tone] = {
    Status.QUEUED: "plain",
    Status.RUNNING: "live",
    Status.PAUSED: "warn",
    Status.SUCCEEDED: "good",
    Status.FAILED: "bad",
    Status.CANCELLED: "plain",
}
OUTCOME_TONES: dict[str, Tone] = {"pass": "good", "block": "bad", "hold": "warn"}
OUTCOME_WORDS = {"pass": "passed", "block": "blocked", "hold": "held"}


def serving(overview: AssistantOverview, now: float) -> Serving:
    name = overview.assistant.name
    wanted, answering = overview.wanted, overview.answering
    pill, notice = Pill("serving", "good"), None
    if overview.serving_error is not None and (answering is None or answering.id != wanted.id):
        meanwhile = (
            f" v{answering.number} keeps answering." if answering is not None else " Nothing answers yet."
        )
        pill = Pill("failed to load", "bad")
        why = overview.serving_error.rstrip(".")
        notice = Notice(f"v{wanted.number} could not be loaded: {why}.{meanwhile}", "bad")
    elif answering is None:
        pill = Pill("loading", "live")
        notice = Notice(f"v{wanted.number} is being loaded; nothing answers for {name} yet.", "live")
    elif answering.id != wanted.id:
        pill = Pill("loading", "live")
        notice = Notice(
            f"v{wanted.number} is being loaded; v{answering.number} answers until it is ready.", "live"
        )
    elif overview.serving_error is not None:
        why = overview.serving_error.rstrip(".")
        notice = Notice(f"Some engines answer with v{wanted.number}, others cannot: {why}.", "warn")
    return Serving(
        wanted=version_link(name, wanted.number),
        answering=version_link(name, answering.number) if answering is not None else None,
        pill=pill,
        notice=notice,
        since=moment(overview.champion.updated_at, now),
        revision=overview.champion.revision,
    )


def update_pill(update: Update) -> Pill:
    """Status, with the stage while it runs and the verdict once there is one."""
    status = Status(update.status)
    if status is Status.RUNNING and update.phase is not None:
        return Pill(update.phase, "live")
    if status is Status.SUCCEEDED and update.verdict is not None:
        outcome = update.verdict["outcome"]
        return Pill(OUTCOME_WORDS[outcome], OUTCOME_TONES[outcome])
    return Pill(status.value, STATUS_TONES[status])


def assistants_page(
    overviews: list[AssistantOverview], *, after: str | None, has_more: bool, api_url: str, now: float
) -> AssistantsPage:
    return AssistantsPage(
        title="Assistants",
        crumbs=crumbs(),
        url=ROOT if after is None else f"{ROOT}?after={quote(after)}",
        api_url=api_url,
        assistants=[_row(overview, now) for overview in overviews],
        next_url=f"{ROOT}?after={overviews[-1].assistant.id}" if has_more else None,
    )


def _row(overview: AssistantOverview, now: float) -> AssistantRow:
    assistant, update = overview.assistant, overview.last_update
    return AssistantRow(
        name=assistant.name,
        url=assistant_url(assistant.name),
        base_model=assistant.base_model,
        serving=serving(overview, now),
        skills=overview.skills,
        last_update=update_pill(update) if update is not None else None,
        last_update_url=update_url(assistant.name, update.id) if update is not None else None,
        last_update_at=moment(_last_change(update), now) if update is not None else None,
    )


def _last_change(update: Update) -> float:
    return update.finished_at or update.started_at or update.created_at
