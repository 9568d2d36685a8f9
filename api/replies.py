"""What the native routes answer with. Times are unix seconds, versions read `v3`, ids are prefixed."""

from typing import Any, Literal

from pydantic import BaseModel, JsonValue

from api.lists import Listed
from domain.demonstration import Message
from domain.measurement import ItemScore, Verdict
from domain.skill import Grader
from domain.traffic import Canary, CanaryRollback, Role, Shadow
from domain.webhook import EventType

VersionName = str
"""`v0`, `v1`, ..."""


class AliasReply(Listed):
    """`id` is the alias's name: it is unique within its assistant."""

    object: Literal["alias"] = "alias"
    assistant: str
    alias: str
    version: VersionName
    revision: int
    serving_version: VersionName | None
    """The version that answers for this alias at the moment; null before the first one loaded."""
    serving_error: str | None
    """Why `version` could not be loaded."""
    updated_at: int


class AssistantReply(Listed):
    object: Literal["assistant"] = "assistant"
    name: str
    description: str
    base_model: str
    parameter_count: int
    context_window: int
    champion: VersionName
    aliases: dict[str, VersionName]
    created_at: int


class SkillReply(Listed):
    object: Literal["skill"] = "skill"
    assistant: str
    name: str
    description: str
    grader: Grader
    holdout_fraction: float
    demonstrations: dict[str, int]
    """Stored demonstrations by split: `train` and `holdout`."""
    created_at: int


class BatchReply(BaseModel):
    id: str | None
    """Null after a dry run: nothing was stored."""
    object: Literal["batch"] = "batch"
    skill: str
    dry_run: bool
    accepted: int
    duplicates: int
    train: int
    holdout: int
    created_at: int | None


class DemonstrationReply(Listed):
    object: Literal["demonstration"] = "demonstration"
    skill: str
    batch: str
    split: Literal["train", "holdout"]
    messages: list[Message]
    response: str
    context: str | None
    answer: str
    metadata: dict[str, JsonValue]
    created_at: int


class UpdateReply(Listed):
    object: Literal["update"] = "update"
    assistant: str
    status: str
    phase: str | None
    skills: list[str]
    recipe: dict[str, Any]
    gate: dict[str, Any]
    publish: Literal["auto", "hold"]
    parent_version: VersionName | None
    """The champion when the update was first claimed; null before that."""
    version: VersionName | None
    verdict: Verdict | None
    error: dict[str, Any] | None
    """{code, message, param} of a failed update."""
    cancel_requested: bool
    pause_requested: bool
    created_at: int
    started_at: int | None
    finished_at: int | None


class EventReply(Listed):
    object: Literal["update.event"] = "update.event"
    seq: int
    """1, 2, 3 ... within the update."""
    type: str
    level: str
    message: str
    data: dict[str, Any]
    created_at: int


class MeasurementReply(Listed):
    object: Literal["measurement"] = "measurement"
    version: VersionName
    kind: Literal["skill", "general"]
    suite: str
    score: float
    n: int
    low: float
    high: float
    """95% interval of the score."""
    updated_at: int


class MeasurementDetailReply(MeasurementReply):
    items: list[ItemScore]


class VersionReply(Listed):
    object: Literal["version"] = "version"
    assistant: str
    version: VersionName
    kind: Literal["base", "adapter", "full"]
    parent: VersionName | None
    update: str | None
    aliases: list[str]
    """Names that point at it now."""
    manifest_sha256: str | None
    verdict: Verdict | None
    pinned: bool
    """Retention leaves its files alone."""
    pruned: bool
    """Retention let its files go: it can serve no more."""
    created_at: int


class VersionDetailReply(VersionReply):
    lineage: list[VersionName]
    """From v0 to this version."""
    recipe: dict[str, Any] | None
    manifest: dict[str, Any] | None
    measurements: list[MeasurementReply]


class AliasMoveReply(Listed):
    object: Literal["alias_move"] = "alias_move"
    alias: str
    from_version: VersionName | None
    to_version: VersionName
    revision: int
    kind: str
    """create | publish | promote | rollback."""
    reason: str
    actor: str
    update: str | None
    created_at: int


class MovedReply(BaseModel):
    """An alias after PUT or rollback."""

    object: Literal["alias_move"] = "alias_move"
    id: str
    alias: str
    from_version: VersionName | None
    to_version: VersionName
    revision: int
    serving: bool
    """Whether every request already gets `to_version`; if not, the swap goes on in the background."""


class TrafficFiguresReply(BaseModel):
    """One version in one role, since canary or shadow came to another alias; seconds to the first byte."""

    role: Role
    version: VersionName
    requests: int
    errors: int
    error_rate: float | None
    latency_p50: float | None
    latency_p95: float | None
    dropped: int
    """Shadow requests that were not sent, as there was no room."""
    compared: int
    """Shadow replies set against the champion's; of these:"""
    identical: float | None
    """Share with the same text."""
    rouge_l: float | None
    """Mean F-measure, words in order."""
    agreement: float | None
    """Mean score by the skill's grader, the champion's reply being the answer."""
    updated_at: int


class TrafficReply(BaseModel):
    object: Literal["traffic"] = "traffic"
    assistant: str
    revision: int
    canary: Canary | None
    canary_version: VersionName | None
    """What the canary's alias names."""
    shadow: Shadow | None
    shadow_version: VersionName | None
    cooldown_until: int | None
    """No canary before this time; null when none was rolled back or it is over."""
    last_rollback: CanaryRollback | None
    rolled_back_at: int | None
    figures: list[TrafficFiguresReply]
    updated_at: int | None


class AuditReply(Listed):
    object: Literal["audit_log"] = "audit_log"
    actor: str
    action: str
    object_id: str
    data: dict[str, Any]
    created_at: int


class WebhookReply(Listed):
    object: Literal["webhook"] = "webhook"
    url: str
    description: str
    event_types: list[EventType]
    """Empty: all."""
    disabled_because: str | None
    created_at: int


class NewWebhookReply(WebhookReply):
    secret: str
    """`whsec_...`: what a Standard Webhooks library takes. Shown this once."""


class DeliveryReply(Listed):
    """One event for one webhook. The id comes with every attempt as `webhook-id`."""

    object: Literal["webhook.delivery"] = "webhook.delivery"
    webhook: str
    type: EventType
    attempts: int
    next_attempt_at: int | None
    """Null once delivered or given up."""
    delivered_at: int | None
    status_code: int | None
    error: str | None
    created_at: int


class DeletedReply(BaseModel):
    id: str
    object: Literal["webhook.deleted"]
    deleted: Literal[True] = True
