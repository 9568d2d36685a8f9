"""Packs by hand, and their states and gradients against sequences run one at a time."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.trainer.conftest import RECIPE
from trainer.loading import load_model
from trainer.model import Model
from trainer.packing import BATCH_TOKENS, PackedBatch, pack, sharing_is_exact
from trainer.sequences import all_response_states

pytestmark = pytest.mark.usefixtures("exact")

ROWS = [([0, 5, 6, 7], [8, 9, 1]), ([0, 5, 6], [7, 1]), ([0, 5, 6, 7], [8, 2, 3, 1]), ([0, 40, 41], [42, 1])]


@pytest.fixture
def model(base_folder: Path) -> Model:
    return load_model(base_folder, RECIPE, None)


def test_what_sequences_share_stands_once() -> None:
    """Sorted: [1 2 3 4], [1 2 5], [1 6]; each hangs where it leaves the one before."""
    (batch,) = pack([[1, 2, 5], [1, 6], [1, 2, 3, 4]], share=True)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 1]]
    assert batch.places == {2: (0, [0, 1, 2, 3]), 0: (0, [0, 1, 4]), 1: (0, [0, 5])}
    assert batch.mask is not None
    assert batch.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 1],
    ]


def test_a_repeated_sequence_and_its_beginning_cost_nothing() -> None:
    """A line of descent needs no mask: plain causality says the same."""
    (batch,) = pack([[1, 2, 3], [1, 2], [1, 2, 3]], share=True)
    assert batch.ids.tolist() == [[1, 2, 3]]
    assert batch.mask is None
    assert batch.places == {1: (0, [0, 1]), 0: (0, [0, 1, 2]), 2: (0, [0, 1, 2])}


def test_without_sharing_every_sequence_has_its_row() -> None:
    (batch,) = pack([[1, 2, 3], [1, 2]], share=False)
    assert batch.ids.tolist() == [[1, 2, 0], [1, 2, 3]]
    assert batch.mask is None


def test_memory_is_bounded() -> None:
    long = [[i] * 300 for i in range(20)]
    batches = pack(long, share=True)
    assert sorted(index for batch in batches for index in batch.places) == list(range(20))
    assert all(batch.ids.numel() <= BATCH_TOKENS for batch in batches)
    assert pack([[7] * 5000], share=True)[0].ids.shape == (1, 5000)


def test_states_and_gradients_are_those_of_separate_sequences(model: Model) -> None:
    def backward(groups: list[list[tuple[list[int], list[int]]]]) -> tuple[list[Tensor], list[Tensor]]:
        with model.using("student"):
            states = [state for rows in groups for state in all_response_states(model, rows)]
            torch.cat(states).square().sum().backward()
        gradients = []
        for parameter in model.parameters("student").values():
            assert parameter.grad is not None
            gradients.append(parameter.grad.clone())
            parameter.grad = None
        return states, gradients

    with torch.no_grad():  # B starts at zero, where A has no gradient
        for name, parameter in model.parameters("student").items():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    assert model.shares_prefixes
    together, packed = backward([ROWS])
    apart, separate = backward([[row] for row in ROWS])
    for one, other in zip([*together, *packed], [*apart, *separate], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_model_that_reads_columns_rather_than_positions_is_not_packed() -> None:
    """A running sum over columns, like a recurrent layer, mixes sequences of one pack."""

    def recurrent(batch: PackedBatch) -> Tensor:
        return batch.ids.float().cumsum(-1)[..., None]

    def by_mask(batch: PackedBatch) -> Tensor:
        length = batch.ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril() if batch.mask is None else batch.mask[:, 0]
        return (mask.float() @ batch.ids.float()[..., None]) + batch.positions[..., None]

    assert not sharing_is_exact(recurrent)
    assert sharing_is_exact(by_mask)
