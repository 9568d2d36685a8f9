"""Files, and the fine-tuning jobs that were made of them."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

TEXT = sa.String(length=255)
KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("seq", KEY, autoincrement=True, nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", TEXT, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", TEXT, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint("purpose in ('fine-tune', 'fine-tune-results')", name=op.f("ck_files_purpose")),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_files_team_id_teams")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_files")),
        sa.UniqueConstraint("id", name=op.f("uq_files_id")),
        sa.UniqueConstraint("team_id", "id", name=op.f("uq_files_team_id_id")),
    )
    op.create_index(op.f("ix_files_team_id_seq"), "files", ["team_id", "seq"], unique=False)
    op.create_table(
        "file_parts",
        sa.Column("file_id", TEXT, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["team_id", "file_id"],
            ["files.team_id", "files.id"],
            name=op.f("fk_file_parts_team_id_file_id_files"),
        ),
        sa.PrimaryKeyConstraint("file_id", "number", name=op.f("pk_file_parts")),
    )
    op.create_table(
        "fine_tuning_jobs",
        sa.Column("seq", KEY, autoincrement=True, nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("team_id", TEXT, nullable=False),
        sa.Column("update_id", TEXT, nullable=False),
        sa.Column("training_file", TEXT, nullable=False),
        sa.Column("validation_file", TEXT, nullable=True),
        sa.Column("result_file", TEXT, nullable=True),
        sa.Column("suffix", TEXT, nullable=True),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["team_id", "update_id"],
            ["updates.team_id", "updates.id"],
            name=op.f("fk_fine_tuning_jobs_team_id_update_id_updates"),
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_fine_tuning_jobs")),
        sa.UniqueConstraint("id", name=op.f("uq_fine_tuning_jobs_id")),
        sa.UniqueConstraint("team_id", "update_id", name=op.f("uq_fine_tuning_jobs_team_id_update_id")),
    )
    op.create_index(
        op.f("ix_fine_tuning_jobs_team_id_seq"), "fine_tuning_jobs", ["team_id", "seq"], unique=False
    )


def downgrade() -> None:
    for table in ("fine_tuning_jobs", "file_parts", "files"):
        op.drop_table(table)
