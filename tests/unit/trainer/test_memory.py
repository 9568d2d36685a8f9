"""No tensor of [response tokens, vocabulary] exists in a training step, forward or backward.

Every operator of whole runs is watched, on a tiny model whose vocabulary is far larger than anything else,
so that a tensor's size in rows of the vocabulary tells what it is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from domain.demonstration import Message
from domain.recipe import Recipe
from domain.skill import ExactGrader
from domain.training import SkillToTeach, StepLine, TrainerLine, TrainingJob
from tests.unit.trainer.builders import demonstration
from tests.unit.trainer.conftest import tiny_tokenizer
from trainer import loss
from trainer.run import train

VOCABULARY = 30_011
"""A prime: a storage that is a multiple of it is one of the vocabulary."""
SEQUENCES = 8
REHEARSALS = 2
WIDTH = 16


class Allocations(TorchDispatchMode):
    """The largest storage, and the most that storages of whole rows of the vocabulary held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_rows = 0.0
        self.most_held_bytes = 0
        self.operators: set[str] = set()
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._note(tensor)
        self.operators.add(str(func))
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        elements = storage.nbytes() // tensor.itemsize
        self.largest_rows = max(self.largest_rows, elements / VOCABULARY)
        if not elements or elements % VOCABULARY:
            return
        self._held = {key: kept for key, kept in self._held.items() if not kept[0].expired()}
        self._held[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.most_held_bytes = max(self.most_held_bytes, sum(size for _, size in self._held.values()))


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def watched(wide_base: Path, tmp_path: Path) -> Callable[..., Allocations]:
    """Runs two steps of a recipe on responses of that many tokens; returns what was allocated."""

    def run(response_tokens: int, **fields: Any) -> Allocations:
        recipe = Recipe(
            num_epochs=8,
            max_steps=2,
            batch_size=SEQUENCES,
            max_new_tokens=8,
            max_rehearsal_tokens=8,
            skip_first_tokens=0,
            # This model never ends an answer, and a sample that is cut is masked: what counts in the loss are
            # demonstrations and rehearsal.
            off_policy_share=1.0,
            rehearsal_share=REHEARSALS / SEQUENCES,
            on_small_gap="train",
            **{"lora_rank": 4} | fields,
        )
        folder = tmp_path / str(response_tokens)
        # One byte is one token, and one more ends the answer.
        responses = [f"{'AB'[i % 2] * (response_tokens - 3)}{i:02}" for i in range(SEQUENCES)]
        job = TrainingJob(
            update_id="memory",
            base_path=str(wide_base),
            base_model="wide",
            parent_adapter_path=None,
            recipe=recipe,
            skills=[
                SkillToTeach(
                    name="say",
                    grader=ExactGrader(),
                    train=[demonstration(f"item {i}", text) for i, text in enumerate(responses)],
                    holdout=[],
                )
            ],
            rehearsal=[[Message(role="user", content=text)] for text in ("hello", "what is this?")],
            checkpoint_dir=str(folder / "checkpoints"),
            output_dir=str(folder / "out"),
        )
        lines: list[TrainerLine] = []
        with Allocations() as allocations:
            train(job, lines.append, lambda: False)
        steps = [line for line in lines if isinstance(line, StepLine)]
        assert len(steps) == 2
        assert all(step.grad_norm > 0 for step in steps)
        return allocations

    return run


def rows_allowed() -> int:
    """A chunk of the loss; the weights, which have WIDTH rows' worth; the logits of a token being drawn in
    each sequence."""
    return max(loss.CHUNK_ROWS, WIDTH, SEQUENCES)


RECIPES = [
    pytest.param({"divergence": "forward"}, id="forward"),
    pytest.param({"divergence": "jsd"}, id="jsd"),
    pytest.param({"divergence": "reverse", "divergence_top_k": 20}, id="reverse over 20 tokens and a tail"),
    pytest.param({"teacher": "parent", "temperature": 0.7}, id="frozen teacher"),
    pytest.param({"method": "sft"}, id="sft"),
    pytest.param({"lora_rank": 0, "teacher": "live"}, id="every weight trains"),
]


@pytest.mark.parametrize("fields", RECIPES)
def test_no_tensor_has_the_tokens_of_a_step_times_the_vocabulary(
    watched: Callable[..., Allocations], fields: dict[str, Any]
) -> None:
    allocations = watched(40, **fields)
    assert 3 * rows_allowed() < (SEQUENCES - REHEARSALS) * 40
    assert allocations.largest_rows <= rows_allowed()
    assert allocations.largest_rows >= loss.CHUNK_ROWS  # the logits of a chunk were seen
    assert any("_softmax_backward" in name or "mul_" in name for name in allocations.operators)


@pytest.mark.parametrize("fields", RECIPES)
def test_what_is_held_does_not_grow_with_the_responses(
    watched: Callable[..., Allocations], fields: dict[str, Any]
) -> None:
    # Two whole chunks in the one, six in the other.
    short, long = watched(24, **fields), watched(72, **fields)
    assert long.most_held_bytes == short.most_held_bytes
    # Student's and teacher's log-probabilities of a chunk, its gradient and what making them takes.
    assert short.most_held_bytes < 12 * loss.CHUNK_ROWS * VOCABULARY * 4


def test_the_watch_sees_a_whole_step_of_logits(
    watched: Callable[..., Allocations], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = rows_allowed()
    monkeypatch.setattr(loss, "CHUNK_ROWS", 1_000_000)
    assert watched(40).largest_rows > 3 * allowed
