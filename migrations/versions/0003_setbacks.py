"""Updates count their setbacks: how often in a row they were lost or failed, and when to try again."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("updates", sa.Column("setbacks", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.add_column("updates", sa.Column("not_before", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("updates", "not_before")
    op.drop_column("updates", "setbacks")
