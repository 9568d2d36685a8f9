"""A ledger on each real database."""

from collections.abc import Iterator

import pytest

from tests.unit.registry.steps import Ledger


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    made = Ledger(database_url)
    yield made
    made.engine.dispose()
