"""Pages of a list, continued after the last id seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Select, SQLColumnExpression, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from domain.errors import InvalidInput

Row = TypeVar("Row")


@dataclass(frozen=True)
class Page(Generic[Row]):
    rows: list[Row]
    has_more: bool


def read_page(
    session: Session,
    rows: Select[Row],
    *,
    key: InstrumentedAttribute[str],
    order: Sequence[SQLColumnExpression[Any]],
    after: str | None,
    limit: int,
    newest_first: bool = False,
) -> Page[Row]:
    """Up to `limit` rows of `rows` in `order`, beginning behind the one whose `key` is `after`.

    Raises InvalidInput(param="after") when no row of the list has that key.
    """
    position = tuple_(*order)
    if after is not None:
        found = session.execute(rows.where(key == after).with_only_columns(*order)).one_or_none()
        if found is None:
            raise InvalidInput(f"No '{after}' in this list.", param="after")
        rows = rows.where(position < tuple(found) if newest_first else position > tuple(found))
    columns = [column.desc() if newest_first else column.asc() for column in order]
    found_rows = list(session.scalars(rows.order_by(*columns).limit(limit + 1)))
    return Page(found_rows[:limit], has_more=len(found_rows) > limit)
