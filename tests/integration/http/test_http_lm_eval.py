"""lm-eval, which knows nothing of Ratchet, asks the gateway and comes to Ratchet's own figures."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest_databases import NewDatabase
from tests.integration.http.stack import Stack
from tests.integration.http.tiny_llama import running_stack, write_llama

pytest.importorskip("lm_eval", reason="`make conformance` installs it")

from benchmarks.lm_eval_check import GENERATED, Comparison, compare

pytestmark = pytest.mark.slow
ITEMS = 12


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_llama(folder, window=512)
    return folder


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, new_sqlite: NewDatabase, model_folder: Path
) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("home"), new_sqlite(True), model_folder) as made:
        yield made


@pytest.mark.parametrize("task", ["ratchet_commonsense", "ratchet_last_word"])
def test_likelihoods_are_ratchets_own(stack: Stack, model_folder: Path, task: str) -> None:
    """Prompts as lists of token ids, echo with log-probabilities, one token generated."""
    found = compare(task, url=stack.url, model="support@v0", tokenizer=str(model_folder), limit=ITEMS)
    assert found.n == ITEMS
    assert found.lm_eval == found.ratchet
    assert found.items_that_differ == 0
    assert found.worst_logprob_difference is not None
    assert found.worst_logprob_difference < 1e-3
    assert found.agrees


def test_generated_answers_are_ratchets_own(stack: Stack, model_folder: Path) -> None:
    found = compare(GENERATED, url=stack.url, model="support@v0", tokenizer=str(model_folder), limit=4)
    assert (found.n, found.items_that_differ, found.agrees) == (4, 0, True)


@pytest.mark.parametrize(
    ("differ", "worst", "agrees"),
    [(0, 0.0, True), (1, 0.0, True), (2, 0.0, True), (3, 0.0, False), (0, 0.01, False), (0, None, True)],
)
def test_what_counts_as_agreement(differ: int, worst: float | None, agrees: bool) -> None:
    """Of 100 items two may differ."""
    assert Comparison("task", 100, 0.5, 0.5, differ, worst).agrees is agrees
