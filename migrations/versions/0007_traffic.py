"""How an assistant's traffic is shared out between champion, canary and shadow, and what came of it."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "traffic",
        sa.Column("assistant_id", sa.String(255), nullable=False),
        sa.Column("team_id", sa.String(255), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("canary", sa.JSON(), nullable=True),
        sa.Column("shadow", sa.JSON(), nullable=True),
        sa.Column("cooldown_until", sa.Double(), nullable=True),
        sa.Column("last_rollback", sa.JSON(), nullable=True),
        sa.Column("rolled_back_at", sa.Double(), nullable=True),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["team_id", "assistant_id"],
            ["assistants.team_id", "assistants.id"],
            name=op.f("fk_traffic_team_id_assistant_id_assistants"),
        ),
        sa.PrimaryKeyConstraint("assistant_id", name=op.f("pk_traffic")),
    )
    op.create_table(
        "traffic_figures",
        sa.Column("assistant_id", sa.String(255), nullable=False),
        sa.Column("role", sa.String(255), nullable=False),
        sa.Column("version_id", sa.String(255), nullable=False),
        sa.Column("team_id", sa.String(255), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("errors", sa.BigInteger(), nullable=False),
        sa.Column("dropped", sa.BigInteger(), nullable=False),
        sa.Column("compared", sa.BigInteger(), nullable=False),
        sa.Column("identical", sa.BigInteger(), nullable=False),
        sa.Column("rouge_l", sa.Double(), nullable=False),
        sa.Column("graded", sa.BigInteger(), nullable=False),
        sa.Column("agreed", sa.Double(), nullable=False),
        sa.Column("latency", sa.JSON(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["team_id", "assistant_id", "version_id"],
            ["versions.team_id", "versions.assistant_id", "versions.id"],
            name=op.f("fk_traffic_figures_version_id_versions"),
        ),
        sa.PrimaryKeyConstraint("assistant_id", "role", "version_id", name=op.f("pk_traffic_figures")),
    )


def downgrade() -> None:
    op.drop_table("traffic_figures")
    op.drop_table("traffic")
