"""Every foreign key carries the team and the assistant; demonstrations are counted on their skill;
webhooks with their outbox."""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TEXT = sa.String(length=255)
KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
OWNER = ["team_id", "assistant_id"]


@dataclass(frozen=True)
class Foreign:
    table: str
    columns: Sequence[str]
    target: str
    to: Sequence[str]

    @property
    def name(self) -> str:
        # All columns of a longer key would not fit into PostgreSQL's 63 characters.
        columns = self.columns if len(self.columns) < 3 else self.columns[-1:]
        return f"fk_{self.table}_{'_'.join(columns)}_{self.target}"


@dataclass(frozen=True)
class Unique:
    table: str
    columns: Sequence[str]

    @property
    def name(self) -> str:
        return f"uq_{self.table}_{'_'.join(self.columns)}"


def _owned(table: str, column: str, target: str) -> Foreign:
    return Foreign(table, [*OWNER, column], target, [*OWNER, "id"])


OLD_FOREIGN = [
    Foreign("serving_states", ["assistant_id"], "assistants", ["id"]),
    Foreign("versions", ["parent_id"], "versions", ["id"]),
    Foreign("alias_moves", ["assistant_id", "to_version_id"], "versions", ["assistant_id", "id"]),
    Foreign("aliases", ["assistant_id", "version_id"], "versions", ["assistant_id", "id"]),
    Foreign("measurements", ["assistant_id", "version_id"], "versions", ["assistant_id", "id"]),
    Foreign("updates", ["parent_version_id"], "versions", ["id"]),
    Foreign("demonstrations", ["batch_id"], "batches", ["id"]),
    Foreign("demonstrations", ["team_id", "skill_id"], "skills", ["team_id", "id"]),
    Foreign("events", ["update_id"], "updates", ["id"]),
    Foreign("measurement_items", ["measurement_id"], "measurements", ["id"]),
    Foreign("update_demonstrations", ["update_id"], "updates", ["id"]),
    Foreign("update_demonstrations", ["demonstration_id"], "demonstrations", ["id"]),
]
NEW_FOREIGN = [
    Foreign("audit_logs", ["team_id"], "teams", ["id"]),
    Foreign("idempotency_keys", ["team_id"], "teams", ["id"]),
    Foreign("serving_states", OWNER, "assistants", ["team_id", "id"]),
    _owned("serving_states", "version_id", "versions"),
    _owned("versions", "parent_id", "versions"),
    _owned("versions", "update_id", "updates"),
    _owned("alias_moves", "from_version_id", "versions"),
    _owned("alias_moves", "to_version_id", "versions"),
    _owned("alias_moves", "update_id", "updates"),
    _owned("aliases", "version_id", "versions"),
    _owned("measurements", "version_id", "versions"),
    _owned("updates", "parent_version_id", "versions"),
    _owned("updates", "version_id", "versions"),
    _owned("demonstrations", "skill_id", "skills"),
    Foreign("demonstrations", ["team_id", "skill_id", "batch_id"], "batches", ["team_id", "skill_id", "id"]),
    Foreign("events", ["team_id", "update_id"], "updates", ["team_id", "id"]),
    Foreign("measurement_items", ["team_id", "measurement_id"], "measurements", ["team_id", "id"]),
    _owned("update_demonstrations", "update_id", "updates"),
    _owned("update_demonstrations", "demonstration_id", "demonstrations"),
]
OLD_UNIQUE = [Unique("versions", ["assistant_id", "id"])]
NEW_UNIQUE = [
    Unique("skills", [*OWNER, "id"]),
    Unique("batches", ["team_id", "skill_id", "id"]),
    Unique("demonstrations", [*OWNER, "id"]),
    Unique("versions", [*OWNER, "id"]),
    Unique("updates", ["team_id", "id"]),
    Unique("updates", [*OWNER, "id"]),
    Unique("measurements", ["team_id", "id"]),
]
NEW_COLUMNS = {
    "serving_states": ["team_id"],
    "measurement_items": ["team_id"],
    "update_demonstrations": OWNER,
}
"""Filled from the row's own parent before they become NOT NULL."""
APPEND_ONLY = ("audit_logs", "alias_moves")


def upgrade() -> None:
    op.add_column("assistants", sa.Column("description", sa.Text(), nullable=False, server_default=""))
    for split in ("train", "holdout"):
        column = f"{split}_demonstrations"
        op.add_column("skills", sa.Column(column, sa.Integer(), nullable=False, server_default="0"))
        op.execute(
            f"UPDATE skills SET {column} = (SELECT count(*) FROM demonstrations "
            f"WHERE demonstrations.skill_id = skills.id AND demonstrations.split = '{split}')"
        )
    for table, names in NEW_COLUMNS.items():
        for name in names:
            op.add_column(table, sa.Column(name, TEXT, nullable=True))
    op.execute(
        "UPDATE serving_states SET team_id = "
        "(SELECT team_id FROM assistants WHERE assistants.id = serving_states.assistant_id)"
    )
    op.execute(
        "UPDATE measurement_items SET team_id = "
        "(SELECT team_id FROM measurements WHERE measurements.id = measurement_items.measurement_id)"
    )
    for name in OWNER:
        op.execute(
            f"UPDATE update_demonstrations SET {name} = "
            f"(SELECT updates.{name} FROM updates WHERE updates.id = update_demonstrations.update_id)"
        )
    _rebuild(OLD_FOREIGN, OLD_UNIQUE, NEW_UNIQUE, NEW_FOREIGN, required=NEW_COLUMNS, dropped={})
    op.create_index(op.f("ix_idempotency_keys_created_at"), "idempotency_keys", ["created_at"])
    op.create_table(
        "webhooks",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("event_types", sa.JSON(), nullable=False),
        sa.Column("secret", TEXT, nullable=False),
        sa.Column("disabled_because", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_webhooks_team_id_teams")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhooks")),
        sa.UniqueConstraint("team_id", "id", name=op.f("uq_webhooks_team_id_id")),
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("seq", KEY, autoincrement=True, nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("webhook_id", TEXT, nullable=False),
        sa.Column("type", TEXT, nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", sa.Double(), nullable=True),
        sa.Column("delivered_at", sa.Double(), nullable=True),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["team_id", "webhook_id"],
            ["webhooks.team_id", "webhooks.id"],
            name=op.f("fk_webhook_deliveries_team_id_webhook_id_webhooks"),
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_webhook_deliveries")),
        sa.UniqueConstraint("id", name=op.f("uq_webhook_deliveries_id")),
    )
    op.create_index(op.f("ix_webhook_deliveries_webhook_id_seq"), "webhook_deliveries", ["webhook_id", "seq"])
    op.create_index(
        "ix_webhook_deliveries_due",
        "webhook_deliveries",
        ["next_attempt_at"],
        sqlite_where=sa.text("next_attempt_at IS NOT NULL"),
        postgresql_where=sa.text("next_attempt_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_table("webhook_deliveries")
    op.drop_table("webhooks")
    op.drop_index(op.f("ix_idempotency_keys_created_at"), table_name="idempotency_keys")
    _rebuild(NEW_FOREIGN, NEW_UNIQUE, OLD_UNIQUE, OLD_FOREIGN, required={}, dropped=NEW_COLUMNS)
    for column in ("train_demonstrations", "holdout_demonstrations"):
        op.drop_column("skills", column)
    op.drop_column("assistants", "description")


def _rebuild(
    old_foreign: Sequence[Foreign],
    old_unique: Sequence[Unique],
    new_unique: Sequence[Unique],
    new_foreign: Sequence[Foreign],
    *,
    required: dict[str, list[str]],
    dropped: dict[str, list[str]],
) -> None:
    """Swap constraints: in place on PostgreSQL; by copying each table once on SQLite, whose foreign keys
    are off meanwhile (migrations/env.py)."""
    if op.get_bind().dialect.name == "sqlite":
        changes = [*old_foreign, *old_unique, *new_unique, *new_foreign]
        for table in dict.fromkeys(change.table for change in changes):
            with op.batch_alter_table(table, recreate="always") as batch:
                for old in (one for one in old_foreign if one.table == table):
                    batch.drop_constraint(old.name, type_="foreignkey")
                for gone in (one for one in old_unique if one.table == table):
                    batch.drop_constraint(gone.name, type_="unique")
                for name in required.get(table, []):
                    batch.alter_column(name, existing_type=TEXT, nullable=False)
                for name in dropped.get(table, []):
                    batch.drop_column(name)
                for unique in (one for one in new_unique if one.table == table):
                    batch.create_unique_constraint(unique.name, list(unique.columns))
                for new in (one for one in new_foreign if one.table == table):
                    batch.create_foreign_key(new.name, new.target, list(new.columns), list(new.to))
            if table in APPEND_ONLY:
                _refuse_changes(table)
        return
    for old in old_foreign:
        op.drop_constraint(old.name, old.table, type_="foreignkey")
    for gone in old_unique:
        op.drop_constraint(gone.name, gone.table, type_="unique")
    for table, names in required.items():
        for name in names:
            op.alter_column(table, name, existing_type=TEXT, nullable=False)
    for table, names in dropped.items():
        for name in names:
            op.drop_column(table, name)
    for unique in new_unique:
        op.create_unique_constraint(unique.name, unique.table, list(unique.columns))
    for new in new_foreign:
        op.create_foreign_key(new.name, new.table, new.target, list(new.columns), list(new.to))


def _refuse_changes(table: str) -> None:
    """The triggers of migration 0001, which the copied SQLite table has lost."""
    for verb in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        )
