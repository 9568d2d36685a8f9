"""What each dashboard template receives: frozen shapes whose texts are ready to show.

Templates format nothing and decide nothing but layout. `Tone` names a colour of the style sheet.
"""

from dataclasses import dataclass
from typing import Literal

Tone = Literal["plain", "good", "bad", "warn", "live", "accent"]


@dataclass(frozen=True)
class Moment:
    """A point in time in UTC, exact and as distance from now."""

    iso: str
    exact: str
    relative: str


@dataclass(frozen=True)
class Pill:
    text: str
    tone: Tone


@dataclass(frozen=True)
class Notice:
    text: str
    tone: Tone


@dataclass(frozen=True)
class Crumb:
    text: str
    url: str | None


@dataclass(frozen=True)
class VersionLink:
    text: str
    """`v3`."""
    url: str


@dataclass(frozen=True)
class Serving:
    """What answers for an assistant's champion, against what the alias asks for."""

    wanted: VersionLink
    answering: VersionLink | None
    pill: Pill
    notice: Notice | None
    since: Moment
    revision: int


@dataclass(frozen=True)
class AssistantRow:
    name: str
    url: str
    base_model: str
    serving: Serving
    skills: int
    last_update: Pill | None
    last_update_url: str | None
    last_update_at: Moment | None


@dataclass(frozen=True)
class AssistantsPage:
    title: str
    crumbs: list[Crumb]
    url: str
    api_url: str
    assistants: list[AssistantRow]
    next_url: str | None


@dataclass(frozen=True)
class MatrixColumn:
    number: int
    link: VersionLink
    champion: bool
    unused: bool
    """Blocked or held by its gate."""
    marks: list[Pill]


@dataclass(frozen=True)
class MatrixCell:
    """One version on one suite. `score` is None where nothing was measured: blank, never 0."""

    score: str | None
    interval: str
    title: str
    url: str
    heat: int
    """Colour step, 0 to 20."""
    low: float
    high: float
    dot: float
    """Interval and score as percent of the cell's width."""
    taught: bool
    """The version's own update taught this skill."""
    unused: bool


@dataclass(frozen=True)
class MatrixRow:
    name: str
    note: str
    """Empty, or what the scores mean where they are no share of right answers."""
    cells: list[MatrixCell]


@dataclass(frozen=True)
class NotServing:
    """A version that its gate kept from serving, and why."""

    link: VersionLink
    pill: Pill
    reasons: list[str]


@dataclass(frozen=True)
class Matrix:
    columns: list[MatrixColumn]
    skills: list[MatrixRow]
    general: list[MatrixRow]
    not_serving: list[NotServing]
    hidden: int
    """Older versions left out of the columns."""
    all_url: str


@dataclass(frozen=True)
class Tile:
    label: str
    value: str | None
    tone: Tone
    note: str


@dataclass(frozen=True)
class SkillRow:
    name: str
    description: str
    grader: str
    train: int
    holdout: int
    untaught: int


@dataclass(frozen=True)
class MoveRow:
    alias: str
    from_version: VersionLink | None
    to_version: VersionLink
    pill: Pill
    rollback: bool
    newest: bool
    reason: str
    actor: str
    at: Moment


@dataclass(frozen=True)
class TrafficSide:
    """One version in one role; seconds to the first byte."""

    pill: Pill
    version: VersionLink
    share: str
    requests: str
    errors: str
    median: str
    tail: str
    agreement: str


@dataclass(frozen=True)
class TrafficPanel:
    notice: Notice | None
    """An automatic rollback."""
    sides: list[TrafficSide]


PhaseState = Literal["done", "now", "stopped", "ahead"]


@dataclass(frozen=True)
class PhaseStep:
    text: str
    state: PhaseState


@dataclass(frozen=True)
class Progress:
    step: int
    steps: int
    eta: str
    figures: list[Tile]


@dataclass(frozen=True)
class Curve:
    """A line chart in a 1160 x 204 view box: paths are ready, labels stand beside the grid lines."""

    line: str
    area: str
    last_x: float
    last_y: float
    last: str
    top: str
    bottom: str
    first_step: int
    last_step: int
    description: str


@dataclass(frozen=True)
class UpdateCard:
    id: str
    url: str
    skills: list[str]
    method: str
    status: Pill
    verdict: Pill | None
    parent: VersionLink | None
    version: VersionLink | None
    phases: list[PhaseStep]
    """Empty before the first claim."""
    progress: Progress | None
    curve: Curve | None
    reasons: list[str]
    error: str | None
    at: Moment
    took: str | None
    finished: bool


@dataclass(frozen=True)
class CheckRow:
    rule: str
    suite: str
    outcome: Pill
    parent: str
    candidate: str
    change: str
    interval: str
    reason: str


@dataclass(frozen=True)
class EventRow:
    at: Moment
    type: str
    tone: Tone
    message: str


@dataclass(frozen=True)
class Field:
    name: str
    value: str


@dataclass(frozen=True)
class AssistantPage:
    title: str
    crumbs: list[Crumb]
    name: str
    url: str
    """Of this page as it is shown, query included."""
    base_model: str
    size: str
    created: Moment
    notice: Notice | None
    serving: Serving
    rollback_url: str
    can_roll_back: bool
    traffic: TrafficPanel | None
    """None: never shared out."""
    matrix: Matrix
    tiles: list[Tile]
    skills: list[SkillRow]
    moves: list[MoveRow]
    updates: list[UpdateCard]
    api_url: str


@dataclass(frozen=True)
class UpdatePage:
    title: str
    crumbs: list[Crumb]
    url: str
    card: UpdateCard
    checks: list[CheckRow]
    recipe: list[Field]
    gate: list[Field]
    publish: str
    demonstrations: str
    events: list[EventRow]
    older_events: bool
    """The list leaves some out."""


@dataclass(frozen=True)
class ItemRow:
    score: Pill
    prompt: str
    output: str
    expected: str


@dataclass(frozen=True)
class MeasurementBox:
    anchor: str
    suite: str
    kind: str
    score: str
    interval: str
    items: list[ItemRow]
    failed: int
    open: bool
    unshown: int
    all_url: str


@dataclass(frozen=True)
class FileRow:
    path: str
    size: str
    sha256: str


@dataclass(frozen=True)
class VersionPage:
    title: str
    crumbs: list[Crumb]
    assistant: str
    text: str
    pills: list[Pill]
    kind: str
    served_name: str
    created: Moment
    update_url: str | None
    lineage: list[VersionLink]
    """The newest of them to this version."""
    base: VersionLink
    """v0."""
    older: bool
    """The lineage begins before the first of them."""
    reasons: list[str]
    checks: list[CheckRow]
    measurements: list[MeasurementBox]
    recipe: list[Field]
    manifest_sha256: str | None
    files: list[FileRow]


@dataclass(frozen=True)
class RollbackTarget:
    number: int
    text: str
    selected: bool


@dataclass(frozen=True)
class RollbackPage:
    title: str
    crumbs: list[Crumb]
    assistant: str
    action: str
    back_url: str
    from_version: str
    to_version: str | None
    targets: list[RollbackTarget]
    revision: int
    token: str
    error: str | None
    """Why the form was refused, or why nothing can be rolled back."""


@dataclass(frozen=True)
class ErrorPage:
    title: str
    crumbs: list[Crumb]
    message: str
