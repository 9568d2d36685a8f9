"""Indexes in the order of the lists: a page of many rows is read, not sorted out of all of them."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

ORDERED = {"demonstrations": ["skill_id", "seq"], "updates": ["assistant_id", "seq"]}


def upgrade() -> None:
    for table, columns in ORDERED.items():
        op.create_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table, columns, unique=False)


def downgrade() -> None:
    for table, columns in ORDERED.items():
        op.drop_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table_name=table)
