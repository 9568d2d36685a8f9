"""What is untaught is found by index: a demonstration names the newest update that took it, and an update
says whether its version is on the champion's lineage. Indexes for sweeps and for the newest moves."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

OWNER = ["team_id", "assistant_id"]
FOREIGN = "fk_demonstrations_update_id_updates"
ADDED = [
    ("demonstrations", ["assistant_id", "update_id", "split", "skill_id"]),
    ("updates", ["assistant_id", "in_lineage", "status"]),
    ("updates", ["status"]),
    ("alias_moves", ["assistant_id", "created_at"]),
]
REPLACED = ["assistant_id", "split"]
LINEAGE = """
    WITH RECURSIVE line (parent_id, update_id) AS (
        SELECT versions.parent_id, versions.update_id FROM versions
        JOIN aliases ON aliases.version_id = versions.id AND aliases.name = 'champion'
        UNION ALL
        SELECT versions.parent_id, versions.update_id FROM versions JOIN line ON versions.id = line.parent_id
    )
    SELECT update_id FROM line WHERE update_id IS NOT NULL
"""
NEWEST = """
    SELECT updates.id FROM updates
    JOIN update_demonstrations ON update_demonstrations.update_id = updates.id
    WHERE update_demonstrations.demonstration_id = demonstrations.id ORDER BY updates.seq DESC LIMIT 1
"""


def upgrade() -> None:
    op.add_column("updates", sa.Column("in_lineage", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute(f"UPDATE updates SET in_lineage = true WHERE id IN ({LINEAGE})")
    op.drop_index(_name("demonstrations", REPLACED), table_name="demonstrations")
    with op.batch_alter_table("demonstrations") as batch:
        batch.add_column(sa.Column("update_id", sa.String(length=255), nullable=True))
        batch.create_foreign_key(FOREIGN, "updates", [*OWNER, "update_id"], [*OWNER, "id"])
    op.execute(
        f"UPDATE demonstrations SET update_id = ({NEWEST}) "
        "WHERE id IN (SELECT demonstration_id FROM update_demonstrations)"
    )
    for table, columns in ADDED:
        op.create_index(_name(table, columns), table, columns, unique=False)


def downgrade() -> None:
    for table, columns in ADDED:
        op.drop_index(_name(table, columns), table_name=table)
    with op.batch_alter_table("demonstrations") as batch:
        batch.drop_constraint(FOREIGN, type_="foreignkey")
        batch.drop_column("update_id")
    op.create_index(_name("demonstrations", REPLACED), "demonstrations", REPLACED, unique=False)
    op.drop_column("updates", "in_lineage")


def _name(table: str, columns: list[str]) -> str:
    return op.f(f"ix_{table}_{'_'.join(columns)}")
