"""Lists as the HTTP contract has them: continued with `after`, `limit` from 1 to 100."""

from dataclasses import dataclass
from typing import Annotated, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel


class Listed(BaseModel):
    """What can stand in a list."""

    id: str


Item = TypeVar("Item", bound=Listed)


class ListOf(BaseModel, Generic[Item]):
    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


def listing(items: list[Item], *, has_more: bool) -> ListOf[Item]:
    return ListOf(
        data=items,
        first_id=items[0].id if items else None,
        last_id=items[-1].id if items else None,
        has_more=has_more,
    )


@dataclass(frozen=True)
class Paging:
    after: Annotated[str | None, Query(max_length=128, description="id of the last item already seen")] = None
    limit: Annotated[int, Query(ge=1, le=100)] = 20
