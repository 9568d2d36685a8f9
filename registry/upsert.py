"""INSERT ... ON CONFLICT DO UPDATE, which SQLAlchemy spells once per database."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from registry.tables import Base


def upsert(
    session: Session,
    table: type[Base],
    rows: Sequence[dict[str, Any]],
    *,
    keys: Sequence[str],
    keep: Sequence[str] = (),
) -> None:
    """Insert `rows`, which share their columns, or overwrite those that exist but for `keys` and `keep`."""
    if not rows:
        return
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    statement = insert(table)
    changed = {name: statement.excluded[name] for name in rows[0] if name not in (*keys, *keep)}
    session.execute(statement.on_conflict_do_update(index_elements=list(keys), set_=changed), list(rows))
