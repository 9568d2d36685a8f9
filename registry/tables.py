"""Tables of the ledger. Times are unix seconds of the database's clock; ids are prefixed text.

JSON columns hold domain shapes as `model_dump(mode="json")`; verbs are the only writers.
"""

from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Constraint,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

BigId = BigInteger().with_variant(Integer, "sqlite")
"""Autoincrementing key on both databases."""


def _team_key(column: str, target: str) -> ForeignKeyConstraint:
    """A reference within the team: one to another team's row is refused by the database itself."""
    return ForeignKeyConstraint(["team_id", column], [f"{target}.team_id", f"{target}.id"])


def _own_key(column: str, target: str, *, cycle: bool = False) -> ForeignKeyConstraint:
    """A reference within the assistant. `cycle`: the two tables refer to each other."""
    return ForeignKeyConstraint(
        ["team_id", "assistant_id", column],
        [f"{target}.team_id", f"{target}.assistant_id", f"{target}.id"],
        use_alter=cycle,
    )


def _reference(key: Constraint, _table: Table) -> str:
    """All columns of a longer key would not fit into PostgreSQL's 63 characters."""
    assert isinstance(key, ForeignKeyConstraint)
    return "_".join(key.column_keys if len(key.column_keys) < 3 else key.column_keys[-1:])


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(reference)s_%(referred_table_name)s",
            "reference": _reference,
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, Any]: JSON, list[Any]: JSON, str: String(255)}


class Team(Base):
    __tablename__ = "teams"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]


class Assistant(Base):
    __tablename__ = "assistants"
    __table_args__ = (UniqueConstraint("team_id", "name"), UniqueConstraint("team_id", "id"))
    id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    name: Mapped[str]
    description: Mapped[str] = mapped_column(Text, default="", server_default="")
    base_model: Mapped[str] = mapped_column(Text)
    parameter_count: Mapped[int] = mapped_column(BigInteger)
    context_window: Mapped[int]
    """Tokens."""
    next_version: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[float]


class Skill(Base):
    __tablename__ = "skills"
    __table_args__ = (
        UniqueConstraint("assistant_id", "name"),
        UniqueConstraint("team_id", "id"),
        UniqueConstraint("team_id", "assistant_id", "id"),
        _team_key("assistant_id", "assistants"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str]
    assistant_id: Mapped[str]
    name: Mapped[str]
    description: Mapped[str] = mapped_column(Text, default="")
    grader: Mapped[dict[str, Any]]
    holdout_fraction: Mapped[float] = mapped_column(Float, default=0.2)
    train_demonstrations: Mapped[int] = mapped_column(default=0, server_default="0")
    holdout_demonstrations: Mapped[int] = mapped_column(default=0, server_default="0")
    """Stored ones by split, counted as they are accepted: counting a million takes a second."""
    created_at: Mapped[float]


class Batch(Base):
    __tablename__ = "batches"
    __table_args__ = (
        _team_key("skill_id", "skills"),
        UniqueConstraint("team_id", "skill_id", "id"),
        Index(None, "skill_id"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str]
    skill_id: Mapped[str]
    accepted: Mapped[int]
    duplicates: Mapped[int]
    created_at: Mapped[float]


class DemonstrationRow(Base):
    __tablename__ = "demonstrations"
    __table_args__ = (
        _own_key("skill_id", "skills"),
        ForeignKeyConstraint(
            ["team_id", "skill_id", "batch_id"], ["batches.team_id", "batches.skill_id", "batches.id"]
        ),
        _own_key("update_id", "updates"),
        UniqueConstraint("skill_id", "content_hash"),
        UniqueConstraint("team_id", "assistant_id", "id"),
        CheckConstraint("split in ('train', 'holdout')", name="split"),
        Index(None, "assistant_id", "update_id", "split", "skill_id"),
        Index(None, "skill_id", "seq"),
        Index(None, "batch_id"),
    )
    seq: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    """Order of acceptance."""
    id: Mapped[str] = mapped_column(unique=True)
    team_id: Mapped[str]
    assistant_id: Mapped[str]
    skill_id: Mapped[str]
    batch_id: Mapped[str]
    split: Mapped[str]
    content_hash: Mapped[str]
    body: Mapped[dict[str, Any]]
    """domain.demonstration.Demonstration."""
    update_id: Mapped[str | None]
    """The newest update that took it; null before the first."""
    created_at: Mapped[float]


class Version(Base):
    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("assistant_id", "number"),
        UniqueConstraint("team_id", "assistant_id", "id"),
        _team_key("assistant_id", "assistants"),
        _own_key("parent_id", "versions"),
        _own_key("update_id", "updates", cycle=True),
        CheckConstraint("kind in ('base', 'adapter', 'full')", name="kind"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str]
    assistant_id: Mapped[str]
    number: Mapped[int]
    kind: Mapped[str]
    parent_id: Mapped[str | None]
    update_id: Mapped[str | None] = mapped_column(unique=True)
    """The update that made it; null for v0."""
    served_name: Mapped[str] = mapped_column(Text)
    """Immutable name under which engines load it; the base model's name for v0."""
    manifest_sha256: Mapped[str | None]
    manifest: Mapped[dict[str, Any] | None]
    """domain.version.Manifest; null for v0."""
    recipe: Mapped[dict[str, Any] | None]
    verdict: Mapped[dict[str, Any] | None]
    """domain.measurement.Verdict; null for v0."""
    pinned: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Retention leaves its files alone."""
    used_at: Mapped[float | None]
    """When somebody was last about to read its files."""
    pruned_at: Mapped[float | None]
    """Since when its files are not kept any more."""
    created_at: Mapped[float]


class Update(Base):
    __tablename__ = "updates"
    __table_args__ = (
        UniqueConstraint("team_id", "id"),
        UniqueConstraint("team_id", "assistant_id", "id"),
        _team_key("assistant_id", "assistants"),
        _own_key("parent_version_id", "versions"),
        _own_key("version_id", "versions"),
        CheckConstraint(
            "status in ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')", name="status"
        ),
        Index(
            "uq_updates_one_running",
            "assistant_id",
            unique=True,
            sqlite_where=text("status = 'running'"),
            postgresql_where=text("status = 'running'"),
        ),
        Index(None, "assistant_id", "status"),
        Index(None, "assistant_id", "in_lineage", "status"),
        Index(None, "assistant_id", "seq"),
        Index(None, "status"),
    )
    seq: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    """FIFO order."""
    id: Mapped[str] = mapped_column(unique=True)
    team_id: Mapped[str]
    assistant_id: Mapped[str]
    status: Mapped[str]
    phase: Mapped[str | None]
    skills: Mapped[list[Any]]
    """Names of the skills taught."""
    recipe: Mapped[dict[str, Any]]
    gate: Mapped[dict[str, Any]]
    publish: Mapped[str]
    parent_version_id: Mapped[str | None]
    """Champion at the time of the first claim."""
    version_id: Mapped[str | None]
    in_lineage: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Its version is the champion or an ancestor of it; every move of the champion keeps it true."""
    verdict: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    """{code, message, param} of a failed update."""
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    pause_requested: Mapped[bool] = mapped_column(default=False)
    fence: Mapped[int] = mapped_column(default=0)
    """Rises with every claim; only the newest fence may write."""
    claimed_by: Mapped[str | None]
    lease_until: Mapped[float | None]
    setbacks: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """Workers lost and passing failures since the update last got further."""
    not_before: Mapped[float | None]
    """Not claimed again before this time, after a setback."""
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]


class UpdateDemonstration(Base):
    __tablename__ = "update_demonstrations"
    __table_args__ = (
        _own_key("update_id", "updates"),
        _own_key("demonstration_id", "demonstrations"),
        Index(None, "demonstration_id"),
    )
    update_id: Mapped[str] = mapped_column(primary_key=True)
    demonstration_id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str]
    assistant_id: Mapped[str]


class Event(Base):
    __tablename__ = "events"
    __table_args__ = (_team_key("update_id", "updates"), UniqueConstraint("update_id", "seq"))
    id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    team_id: Mapped[str]
    update_id: Mapped[str]
    seq: Mapped[int]
    """1, 2, 3 ... within the update; the SSE id."""
    type: Mapped[str]
    """message | metrics | phase | verdict."""
    level: Mapped[str]
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class Alias(Base):
    __tablename__ = "aliases"
    __table_args__ = (
        UniqueConstraint("assistant_id", "name"),
        _own_key("version_id", "versions"),
    )
    id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    team_id: Mapped[str]
    assistant_id: Mapped[str]
    name: Mapped[str]
    version_id: Mapped[str]
    revision: Mapped[int]
    """Rises by one with every move; the ETag."""
    updated_at: Mapped[float]


class AliasMove(Base):
    """Append-only history of an alias."""

    __tablename__ = "alias_moves"
    __table_args__ = (
        UniqueConstraint("assistant_id", "alias", "revision"),
        Index(None, "assistant_id", "created_at"),
        _own_key("from_version_id", "versions"),
        _own_key("to_version_id", "versions"),
        _own_key("update_id", "updates"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str]
    assistant_id: Mapped[str]
    alias: Mapped[str]
    from_version_id: Mapped[str | None]
    to_version_id: Mapped[str]
    revision: Mapped[int]
    kind: Mapped[str]
    """create | publish | promote | rollback."""
    reason: Mapped[str] = mapped_column(Text, default="")
    actor: Mapped[str]
    update_id: Mapped[str | None]
    created_at: Mapped[float]


class MeasurementRow(Base):
    __tablename__ = "measurements"
    __table_args__ = (
        _own_key("version_id", "versions"),
        UniqueConstraint("version_id", "kind", "suite"),
        UniqueConstraint("team_id", "id"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str]
    assistant_id: Mapped[str]
    version_id: Mapped[str]
    kind: Mapped[str]
    suite: Mapped[str]
    score: Mapped[float]
    n: Mapped[int]
    low: Mapped[float]
    high: Mapped[float]
    updated_at: Mapped[float]


class MeasurementItem(Base):
    __tablename__ = "measurement_items"
    __table_args__ = (_team_key("measurement_id", "measurements"),)
    measurement_id: Mapped[str] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str]
    prompt: Mapped[str] = mapped_column(Text)
    output: Mapped[str] = mapped_column(Text)
    expected: Mapped[str] = mapped_column(Text)
    score: Mapped[float]


class AuditRow(Base):
    """Every mutation, written in its own transaction; triggers refuse UPDATE and DELETE."""

    __tablename__ = "audit_logs"
    __table_args__ = (Index(None, "team_id", "seq"),)
    seq: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    """Order of writing: the clock of SQLite counts milliseconds, and one can hold several entries."""
    id: Mapped[str] = mapped_column(unique=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    actor: Mapped[str]
    action: Mapped[str]
    """`assistant.create`, `batch.accept`, `update.create`, `alias.move`, ..."""
    object_id: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class IdempotencyKey(Base):
    __tablename__ = "idempotency_keys"
    __table_args__ = (Index(None, "created_at"),)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_hash: Mapped[str]
    """sha256 of method, path and body."""
    status_code: Mapped[int | None]
    """Null while the first request is in flight."""
    response: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float]


class Replica(Base):
    """An inference server; `ratchet up` registers its engines here."""

    __tablename__ = "replicas"
    url: Mapped[str] = mapped_column(Text, primary_key=True)
    base_model: Mapped[str] = mapped_column(Text)
    """What it was started with and adapters on it lie on: an assistant's `base_model`, or the id of a full
    version, or of the update whose candidate is one."""
    model_name: Mapped[str] = mapped_column(Text)
    """Name under which it serves that."""
    registered_at: Mapped[float]


class EngineDemand(Base):
    """Somebody needs an engine process that runs a whole model other than a base model."""

    __tablename__ = "engine_demands"
    model_id: Mapped[str] = mapped_column(primary_key=True)
    """A full version's, or that of the update whose candidate is one."""
    holder: Mapped[str] = mapped_column(primary_key=True)
    """A gateway's mark, or the id of an update that measures; its demand holds as long as its lease."""
    until: Mapped[float | None]
    """Null for an update."""
    folder: Mapped[str | None] = mapped_column(Text)
    """Of a candidate's files."""
    error: Mapped[str | None] = mapped_column(Text)
    """Why no engine runs it."""


class ServingState(Base):
    """What the swap controller last made true: `version_id` answers for this alias."""

    __tablename__ = "serving_states"
    __table_args__ = (_team_key("assistant_id", "assistants"), _own_key("version_id", "versions"))
    assistant_id: Mapped[str] = mapped_column(primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str]
    version_id: Mapped[str | None]
    error: Mapped[str | None] = mapped_column(Text)
    """Why the wanted version could not be loaded; the old one keeps serving."""
    updated_at: Mapped[float]


class TrafficRow(Base):
    """How an assistant's traffic is shared out; kept when all of it goes to the champion again."""

    __tablename__ = "traffic"
    __table_args__ = (_team_key("assistant_id", "assistants"),)
    assistant_id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str]
    revision: Mapped[int]
    """Rises by one with every change; the ETag."""
    canary: Mapped[dict[str, Any] | None]
    """domain.traffic.Canary; null: none."""
    shadow: Mapped[dict[str, Any] | None]
    cooldown_until: Mapped[float | None]
    """No canary before this time, after an automatic rollback."""
    last_rollback: Mapped[dict[str, Any] | None]
    """domain.traffic.CanaryRollback."""
    rolled_back_at: Mapped[float | None]
    updated_at: Mapped[float]


class TrafficFigures(Base):
    """Sums over one version's requests in one role, since canary or shadow came to another alias."""

    __tablename__ = "traffic_figures"
    __table_args__ = (_own_key("version_id", "versions"),)
    assistant_id: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    """champion | canary | shadow."""
    version_id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str]
    requests: Mapped[int] = mapped_column(BigInteger)
    errors: Mapped[int] = mapped_column(BigInteger)
    dropped: Mapped[int] = mapped_column(BigInteger)
    """Shadow requests that were not sent, as there was no room."""
    compared: Mapped[int] = mapped_column(BigInteger)
    """Shadow replies set against the champion's; of these:"""
    identical: Mapped[int] = mapped_column(BigInteger)
    rouge_l: Mapped[float]
    """Sum."""
    graded: Mapped[int] = mapped_column(BigInteger)
    agreed: Mapped[float]
    """Sum of the skill's grader's scores."""
    latency: Mapped[dict[str, Any]]
    """Requests by `serving.latency` bucket of their time to the first byte."""
    updated_at: Mapped[float]


class Webhook(Base):
    """An address that hears of a team's events."""

    __tablename__ = "webhooks"
    __table_args__ = (UniqueConstraint("team_id", "id"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    url: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(Text)
    event_types: Mapped[list[Any]]
    """domain.webhook.EventType each; empty: all."""
    secret: Mapped[str]
    """`whsec_` and base64."""
    disabled_because: Mapped[str | None] = mapped_column(Text)
    """Null while it is delivered to."""
    created_at: Mapped[float]


class WebhookDelivery(Base):
    """The outbox: one event for one webhook, written in the transaction of what it tells."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        _team_key("webhook_id", "webhooks"),
        Index(None, "webhook_id", "seq"),
        Index(
            "ix_webhook_deliveries_due",
            "next_attempt_at",
            sqlite_where=text("next_attempt_at IS NOT NULL"),
            postgresql_where=text("next_attempt_at IS NOT NULL"),
        ),
    )
    seq: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    """The same for every attempt, so that a receiver knows a repetition."""
    team_id: Mapped[str]
    webhook_id: Mapped[str]
    type: Mapped[str]
    body: Mapped[str] = mapped_column(Text)
    """JSON, exactly as it is signed and sent."""
    attempts: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[float | None]
    """Null once delivered or given up."""
    delivered_at: Mapped[float | None]
    status_code: Mapped[int | None]
    """Of the last attempt; null when no reply came."""
    error: Mapped[str | None] = mapped_column(Text)
    """Why the last attempt failed."""
    created_at: Mapped[float]


class File(Base):
    """An uploaded or computed file; its bytes are its parts, in the same ledger."""

    __tablename__ = "files"
    __table_args__ = (
        UniqueConstraint("team_id", "id"),
        Index(None, "team_id", "seq"),
        CheckConstraint("purpose in ('fine-tune', 'fine-tune-results')", name="purpose"),
    )
    seq: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    """Order of creation."""
    id: Mapped[str] = mapped_column(unique=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    """Bytes."""
    sha256: Mapped[str]
    created_at: Mapped[float]


class FilePart(Base):
    __tablename__ = "file_parts"
    __table_args__ = (_team_key("file_id", "files"),)
    file_id: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    """0, 1, 2 ... in the order of the bytes."""
    team_id: Mapped[str]
    content: Mapped[bytes] = mapped_column(LargeBinary)


class FineTuningJob(Base):
    """An update that was asked for as an OpenAI fine-tuning job: what the update itself does not say."""

    __tablename__ = "fine_tuning_jobs"
    __table_args__ = (
        _team_key("update_id", "updates"),
        UniqueConstraint("team_id", "update_id"),
        Index(None, "team_id", "seq"),
    )
    seq: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    """Order of creation."""
    id: Mapped[str] = mapped_column(unique=True)
    team_id: Mapped[str]
    update_id: Mapped[str]
    training_file: Mapped[str]
    """Id; the file itself may be deleted: the job holds its demonstrations."""
    validation_file: Mapped[str | None]
    result_file: Mapped[str | None]
    """Id of the metrics of every step, once the update has succeeded."""
    suffix: Mapped[str | None]
    labels: Mapped[dict[str, Any]] = mapped_column("metadata")
    """The client's own `metadata`: text to text."""
    created_at: Mapped[float]
