"""The table from domain errors to HTTP is total, in all rooms that the API loads."""

from collections.abc import Iterator

import pytest

import api.app  # noqa: F401 - loads every room whose errors can reach a client
from api.errors import STATUS, error_body, status_of
from domain.errors import NotFound, RatchetError


def subclasses(of: type[RatchetError]) -> Iterator[type[RatchetError]]:
    for one in of.__subclasses__():
        yield one
        yield from subclasses(one)


def test_every_domain_error_has_an_entry() -> None:
    known = set(subclasses(RatchetError))
    assert len(known) >= 14
    missing = {error for error in known if error.__module__ == "domain.errors"} - STATUS.keys()
    assert missing == set()
    for error in known:
        assert 400 <= status_of(error) < 600


def test_no_entry_is_left_over() -> None:
    assert STATUS.keys() <= set(subclasses(RatchetError))


def test_a_subclass_has_its_parents_status() -> None:
    class Lost(NotFound):
        pass

    assert status_of(Lost) == 404


def test_an_error_outside_the_tree_is_a_programming_error() -> None:
    with pytest.raises(LookupError, match="RatchetError is missing"):
        status_of(RatchetError)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (499, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
    ],
)
def test_an_error_body_has_all_four_keys(status: int, kind: str) -> None:
    assert error_body(status, "no", param=None, code=None) == {
        "error": {"message": "no", "type": kind, "param": None, "code": None}
    }
