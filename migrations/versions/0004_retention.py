"""Versions may be pinned, remember when their files were last needed, and may lose them to retention."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("versions", sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("versions", sa.Column("used_at", sa.Double(), nullable=True))
    op.add_column("versions", sa.Column("pruned_at", sa.Double(), nullable=True))


def downgrade() -> None:
    for column in ("pruned_at", "used_at", "pinned"):
        op.drop_column("versions", column)
