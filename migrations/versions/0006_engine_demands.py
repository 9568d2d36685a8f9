"""Full versions need an engine process of their own: who asks for one, and until when."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "engine_demands",
        sa.Column("model_id", sa.String(length=255), nullable=False),
        sa.Column("holder", sa.String(length=255), nullable=False),
        sa.Column("until", sa.Double(), nullable=True),
        sa.Column("folder", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("model_id", "holder", name=op.f("pk_engine_demands")),
    )


def downgrade() -> None:
    op.drop_table("engine_demands")
