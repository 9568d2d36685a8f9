"""The ledger: teams to serving states, append-only audit log and alias history, the default team."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TEXT = sa.String(length=255)
KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
APPEND_ONLY = ("audit_logs", "alias_moves")


def upgrade() -> None:
    op.create_table(
        "audit_logs",
        sa.Column("seq", KEY, autoincrement=True, nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("actor", TEXT, nullable=False),
        sa.Column("action", TEXT, nullable=False),
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit_logs")),
        sa.UniqueConstraint("id", name=op.f("uq_audit_logs_id")),
    )
    op.create_index(
        op.f("ix_audit_logs_team_id_seq"),
        "audit_logs",
        ["team_id", "seq"],
        unique=False,
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("key", TEXT, nullable=False),
        sa.Column("request_hash", TEXT, nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("response", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("team_id", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_table(
        "replicas",
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("registered_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("url", name=op.f("pk_replicas")),
    )
    op.create_table(
        "teams",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_teams")),
        sa.UniqueConstraint("name", name=op.f("uq_teams_name")),
    )
    op.create_table(
        "assistants",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("parameter_count", sa.BigInteger(), nullable=False),
        sa.Column("context_window", sa.Integer(), nullable=False),
        sa.Column("next_version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_assistants_team_id_teams")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_assistants")),
        sa.UniqueConstraint("team_id", "id", name=op.f("uq_assistants_team_id_id")),
        sa.UniqueConstraint("team_id", "name", name=op.f("uq_assistants_team_id_name")),
    )
    op.create_table(
        "serving_states",
        sa.Column("assistant_id", TEXT, nullable=False),
        sa.Column("alias", TEXT, nullable=False),
        sa.Column("version_id", TEXT, nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["assistant_id"], ["assistants.id"], name=op.f("fk_serving_states_assistant_id_assistants")
        ),
        sa.PrimaryKeyConstraint("assistant_id", "alias", name=op.f("pk_serving_states")),
    )
    op.create_table(
        "skills",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("assistant_id", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("grader", sa.JSON(), nullable=False),
        sa.Column("holdout_fraction", sa.Float(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["team_id", "assistant_id"],
            ["assistants.team_id", "assistants.id"],
            name=op.f("fk_skills_team_id_assistant_id_assistants"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_skills")),
        sa.UniqueConstraint("assistant_id", "name", name=op.f("uq_skills_assistant_id_name")),
        sa.UniqueConstraint("team_id", "id", name=op.f("uq_skills_team_id_id")),
    )
    op.create_table(
        "versions",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("assistant_id", TEXT, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("parent_id", TEXT, nullable=True),
        sa.Column("update_id", TEXT, nullable=True),
        sa.Column("served_name", sa.Text(), nullable=False),
        sa.Column("manifest_sha256", TEXT, nullable=True),
        sa.Column("manifest", sa.JSON(), nullable=True),
        sa.Column("recipe", sa.JSON(), nullable=True),
        sa.Column("verdict", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint("kind in ('base', 'adapter', 'full')", name=op.f("ck_versions_kind")),
        sa.ForeignKeyConstraint(["parent_id"], ["versions.id"], name=op.f("fk_versions_parent_id_versions")),
        sa.ForeignKeyConstraint(
            ["team_id", "assistant_id"],
            ["assistants.team_id", "assistants.id"],
            name=op.f("fk_versions_team_id_assistant_id_assistants"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_versions")),
        sa.UniqueConstraint("assistant_id", "id", name=op.f("uq_versions_assistant_id_id")),
        sa.UniqueConstraint("assistant_id", "number", name=op.f("uq_versions_assistant_id_number")),
        sa.UniqueConstraint("update_id", name=op.f("uq_versions_update_id")),
    )
    op.create_table(
        "alias_moves",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("assistant_id", TEXT, nullable=False),
        sa.Column("alias", TEXT, nullable=False),
        sa.Column("from_version_id", TEXT, nullable=True),
        sa.Column("to_version_id", TEXT, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("actor", TEXT, nullable=False),
        sa.Column("update_id", TEXT, nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["assistant_id", "to_version_id"],
            ["versions.assistant_id", "versions.id"],
            name=op.f("fk_alias_moves_assistant_id_to_version_id_versions"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alias_moves")),
        sa.UniqueConstraint(
            "assistant_id", "alias", "revision", name=op.f("uq_alias_moves_assistant_id_alias_revision")
        ),
    )
    op.create_table(
        "aliases",
        sa.Column("id", KEY, autoincrement=True, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("assistant_id", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("version_id", TEXT, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["assistant_id", "version_id"],
            ["versions.assistant_id", "versions.id"],
            name=op.f("fk_aliases_assistant_id_version_id_versions"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_aliases")),
        sa.UniqueConstraint("assistant_id", "name", name=op.f("uq_aliases_assistant_id_name")),
    )
    op.create_table(
        "batches",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("skill_id", TEXT, nullable=False),
        sa.Column("accepted", sa.Integer(), nullable=False),
        sa.Column("duplicates", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["team_id", "skill_id"],
            ["skills.team_id", "skills.id"],
            name=op.f("fk_batches_team_id_skill_id_skills"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_index(op.f("ix_batches_skill_id"), "batches", ["skill_id"], unique=False)
    op.create_table(
        "measurements",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("assistant_id", TEXT, nullable=False),
        sa.Column("version_id", TEXT, nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("suite", TEXT, nullable=False),
        sa.Column("score", sa.Double(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("low", sa.Double(), nullable=False),
        sa.Column("high", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["assistant_id", "version_id"],
            ["versions.assistant_id", "versions.id"],
            name=op.f("fk_measurements_assistant_id_version_id_versions"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_measurements")),
        sa.UniqueConstraint(
            "version_id", "kind", "suite", name=op.f("uq_measurements_version_id_kind_suite")
        ),
    )
    op.create_table(
        "updates",
        sa.Column("seq", KEY, autoincrement=True, nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("assistant_id", TEXT, nullable=False),
        sa.Column("status", TEXT, nullable=False),
        sa.Column("phase", TEXT, nullable=True),
        sa.Column("skills", sa.JSON(), nullable=False),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("gate", sa.JSON(), nullable=False),
        sa.Column("publish", TEXT, nullable=False),
        sa.Column("parent_version_id", TEXT, nullable=True),
        sa.Column("version_id", TEXT, nullable=True),
        sa.Column("verdict", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("pause_requested", sa.Boolean(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("claimed_by", TEXT, nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "status in ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_updates_status"),
        ),
        sa.ForeignKeyConstraint(
            ["parent_version_id"], ["versions.id"], name=op.f("fk_updates_parent_version_id_versions")
        ),
        sa.ForeignKeyConstraint(
            ["team_id", "assistant_id"],
            ["assistants.team_id", "assistants.id"],
            name=op.f("fk_updates_team_id_assistant_id_assistants"),
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_updates")),
        sa.UniqueConstraint("id", name=op.f("uq_updates_id")),
    )
    op.create_index(
        op.f("ix_updates_assistant_id_status"), "updates", ["assistant_id", "status"], unique=False
    )
    op.create_index(
        "uq_updates_one_running",
        "updates",
        ["assistant_id"],
        unique=True,
        sqlite_where=sa.text("status = 'running'"),
        postgresql_where=sa.text("status = 'running'"),
    )
    op.create_table(
        "demonstrations",
        sa.Column("seq", KEY, autoincrement=True, nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("assistant_id", TEXT, nullable=False),
        sa.Column("skill_id", TEXT, nullable=False),
        sa.Column("batch_id", TEXT, nullable=False),
        sa.Column("split", TEXT, nullable=False),
        sa.Column("content_hash", TEXT, nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint("split in ('train', 'holdout')", name=op.f("ck_demonstrations_split")),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_demonstrations_batch_id_batches")
        ),
        sa.ForeignKeyConstraint(
            ["team_id", "skill_id"],
            ["skills.team_id", "skills.id"],
            name=op.f("fk_demonstrations_team_id_skill_id_skills"),
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_demonstrations")),
        sa.UniqueConstraint("id", name=op.f("uq_demonstrations_id")),
        sa.UniqueConstraint("skill_id", "content_hash", name=op.f("uq_demonstrations_skill_id_content_hash")),
    )
    op.create_index(
        op.f("ix_demonstrations_assistant_id_split"),
        "demonstrations",
        ["assistant_id", "split"],
        unique=False,
    )
    op.create_index(op.f("ix_demonstrations_batch_id"), "demonstrations", ["batch_id"], unique=False)
    op.create_table(
        "events",
        sa.Column("id", KEY, autoincrement=True, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("update_id", TEXT, nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("type", TEXT, nullable=False),
        sa.Column("level", TEXT, nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["update_id"], ["updates.id"], name=op.f("fk_events_update_id_updates")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
        sa.UniqueConstraint("update_id", "seq", name=op.f("uq_events_update_id_seq")),
    )
    op.create_table(
        "measurement_items",
        sa.Column("measurement_id", TEXT, nullable=False),
        sa.Column("item", TEXT, nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("output", sa.Text(), nullable=False),
        sa.Column("expected", sa.Text(), nullable=False),
        sa.Column("score", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["measurement_id"],
            ["measurements.id"],
            name=op.f("fk_measurement_items_measurement_id_measurements"),
        ),
        sa.PrimaryKeyConstraint("measurement_id", "item", name=op.f("pk_measurement_items")),
    )
    op.create_table(
        "update_demonstrations",
        sa.Column("update_id", TEXT, nullable=False),
        sa.Column("demonstration_id", TEXT, nullable=False),
        sa.ForeignKeyConstraint(
            ["demonstration_id"],
            ["demonstrations.id"],
            name=op.f("fk_update_demonstrations_demonstration_id_demonstrations"),
        ),
        sa.ForeignKeyConstraint(
            ["update_id"], ["updates.id"], name=op.f("fk_update_demonstrations_update_id_updates")
        ),
        sa.PrimaryKeyConstraint("update_id", "demonstration_id", name=op.f("pk_update_demonstrations")),
    )
    op.create_index(
        op.f("ix_update_demonstrations_demonstration_id"),
        "update_demonstrations",
        ["demonstration_id"],
        unique=False,
    )
    for table in APPEND_ONLY:
        _refuse_changes(table)
    op.execute("INSERT INTO teams (id, name, created_at) VALUES ('team_default', 'default', 0)")


def downgrade() -> None:
    for table in APPEND_ONLY:
        _allow_changes(table)
    op.drop_index(op.f("ix_update_demonstrations_demonstration_id"), table_name="update_demonstrations")
    op.drop_table("update_demonstrations")
    op.drop_table("measurement_items")
    op.drop_table("events")
    op.drop_index(op.f("ix_demonstrations_batch_id"), table_name="demonstrations")
    op.drop_index(op.f("ix_demonstrations_assistant_id_split"), table_name="demonstrations")
    op.drop_table("demonstrations")
    op.drop_index(
        "uq_updates_one_running",
        table_name="updates",
        sqlite_where=sa.text("status = 'running'"),
        postgresql_where=sa.text("status = 'running'"),
    )
    op.drop_index(op.f("ix_updates_assistant_id_status"), table_name="updates")
    op.drop_table("updates")
    op.drop_table("measurements")
    op.drop_index(op.f("ix_batches_skill_id"), table_name="batches")
    op.drop_table("batches")
    op.drop_table("aliases")
    op.drop_table("alias_moves")
    op.drop_table("versions")
    op.drop_table("skills")
    op.drop_table("serving_states")
    op.drop_table("assistants")
    op.drop_table("teams")
    op.drop_table("replicas")
    op.drop_table("idempotency_keys")
    op.drop_index(op.f("ix_audit_logs_team_id_seq"), table_name="audit_logs")
    op.drop_table("audit_logs")


def _refuse_changes(table: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
        return
    op.execute(
        f"CREATE FUNCTION {table}_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{table} is append-only' USING ERRCODE = 'restrict_violation'; END $$"
    )
    # One statement-level trigger, so that TRUNCATE is refused as well.
    op.execute(
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_append_only()"
    )


def _allow_changes(table: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(f"DROP TRIGGER {table}_no_{verb.lower()}")
        return
    op.execute(f"DROP TRIGGER {table}_append_only ON {table}")
    op.execute(f"DROP FUNCTION {table}_append_only()")
