"""Packed steps against transformers and peft, which run one sequence at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from engine.adapters import read_adapter
from engine.attention import Chunk, Step
from engine.kv_cache import KvCache
from engine.lora import Adapter, rows_by_adapter
from engine.model import BaseModel

PROMPTS = [[10, 20, 30, 40, 50], [99, 98, 97], [5] * 17, [200, 7, 31, 64, 128, 3, 9, 77]]


def new_cache(base: BaseModel) -> KvCache:
    return KvCache(base.cache_shape, max_rows=8, max_length=base.max_length, budget_tokens=4096)


def expected(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one sequence alone."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def assert_close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual.log_softmax(-1), wanted.log_softmax(-1), atol=1e-4, rtol=0)


def test_packed_prompts_do_not_see_each_other(base: BaseModel, reference: LlamaForCausalLM) -> None:
    cache = new_cache(base)
    chunks = [Chunk(cache.add(), prompt) for prompt in PROMPTS]
    total = sum(len(prompt) for prompt in PROMPTS)
    logits = base.forward(Step(cache, [], chunks, []), list(range(total)))
    assert_close(logits, torch.cat([expected(reference, prompt) for prompt in PROMPTS]))


@pytest.mark.parametrize("sizes", [[1, 16], [5, 5, 7], [16, 1]])
def test_prompt_in_chunks_is_the_prompt(
    base: BaseModel, reference: LlamaForCausalLM, sizes: list[int]
) -> None:
    cache, prompt = new_cache(base), list(range(40, 57))
    slot = cache.add()
    parts = []
    for size in sizes:
        chunk = Chunk(slot, prompt[slot.length : slot.length + size])
        parts.append(base.forward(Step(cache, [], [chunk], []), list(range(size))))
    assert_close(torch.cat(parts), expected(reference, prompt))


def test_decoding_beside_a_new_prompt(base: BaseModel, reference: LlamaForCausalLM) -> None:
    cache = new_cache(base)
    slots = [cache.add() for _ in PROMPTS[:3]]
    base.forward(
        Step(cache, [], [Chunk(slot, prompt) for slot, prompt in zip(slots, PROMPTS, strict=False)], []), [0]
    )
    late = cache.add()
    step = Step(cache, [Chunk(slot, [60 + i]) for i, slot in enumerate(slots)], [Chunk(late, PROMPTS[3])], [])
    assert step.decode_is_dense
    logits = base.forward(step, [0, 1, 2, 10])
    wanted = [expected(reference, [*PROMPTS[i], 60 + i])[-1] for i in range(3)]
    assert_close(logits, torch.stack([*wanted, expected(reference, PROMPTS[3])[-1]]))


def test_decoding_rows_that_are_not_dense(base: BaseModel, reference: LlamaForCausalLM) -> None:
    cache = new_cache(base)
    slots = [cache.add() for _ in PROMPTS]
    base.forward(
        Step(cache, [], [Chunk(slot, prompt) for slot, prompt in zip(slots, PROMPTS, strict=True)], []), [0]
    )
    step = Step(cache, [Chunk(slots[1], [61]), Chunk(slots[3], [63])], [], [])
    assert not step.decode_is_dense
    wanted = [expected(reference, [*PROMPTS[1], 61])[-1], expected(reference, [*PROMPTS[3], 63])[-1]]
    assert_close(base.forward(step, [0, 1]), torch.stack(wanted))


def test_removed_row_moves_the_last_one_whole(base: BaseModel, reference: LlamaForCausalLM) -> None:
    cache = new_cache(base)
    slots = [cache.add() for _ in PROMPTS]
    base.forward(
        Step(cache, [], [Chunk(slot, prompt) for slot, prompt in zip(slots, PROMPTS, strict=True)], []), [0]
    )
    cache.remove(slots[0])
    assert [slot.row for slot in slots[1:]] == [1, 2, 0]
    logits = base.forward(Step(cache, [Chunk(slots[3], [63])], [], []), [0])
    assert_close(logits, expected(reference, [*PROMPTS[3], 63])[-1:])


def test_sliding_window(tmp_path: Path, model_dir: Path) -> None:
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        sliding_window=6,
        initializer_range=0.3,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    base = BaseModel(tmp_path, dtype="float32", max_model_len=None)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    cache, prompt = new_cache(base), list(range(30, 50))
    slot = cache.add()
    first = base.forward(Step(cache, [], [Chunk(slot, prompt[:13])], []), list(range(13)))
    second = base.forward(Step(cache, [], [Chunk(slot, prompt[13:])], []), list(range(7)))
    third = base.forward(Step(cache, [Chunk(slot, [99])], [], []), [0])
    assert_close(torch.cat([first, second, third]), expected(alone.eval(), [*prompt, 99]))


@pytest.fixture
def adapters(base: BaseModel, adapter_dirs: list[Path]) -> list[Adapter]:
    return [read_adapter(f"a{i}", folder, base.module) for i, folder in enumerate(adapter_dirs)]


def test_adapters_change_their_own_rows_only(
    base: BaseModel,
    reference: LlamaForCausalLM,
    adapters: list[Adapter],
    peft_references: list[PeftModel],
) -> None:
    """Base, first, second and first again in one step: contiguous rows and scattered ones."""
    owners = [None, adapters[0], adapters[1], adapters[0]]
    alone = [reference, peft_references[0], peft_references[1], peft_references[0]]
    cache = new_cache(base)
    slots = [cache.add() for _ in PROMPTS]
    sizes = [len(prompt) for prompt in PROMPTS]
    grouped = rows_by_adapter(list(zip(owners, sizes, strict=True)), base.device)
    chunks = [Chunk(slot, prompt) for slot, prompt in zip(slots, PROMPTS, strict=True)]
    logits = base.forward(Step(cache, [], chunks, grouped), list(range(sum(sizes))))
    wanted = [expected(model, prompt) for model, prompt in zip(alone, PROMPTS, strict=True)]
    assert_close(logits, torch.cat(wanted))
    differences = [(wanted[i] - expected(reference, PROMPTS[i])).abs().max() for i in (1, 2)]
    assert min(differences) > 1, "the adapters must matter for this test to mean anything"

    grouped = rows_by_adapter([(owner, 1) for owner in owners], base.device)
    logits = base.forward(Step(cache, [Chunk(slot, [64]) for slot in slots], [], grouped), [0, 1, 2, 3])
    wanted = [expected(model, [*prompt, 64])[-1] for model, prompt in zip(alone, PROMPTS, strict=True)]
    assert_close(logits, torch.stack(wanted))


def test_one_adapter_for_all_rows(
    base: BaseModel, adapters: list[Adapter], peft_references: list[PeftModel]
) -> None:
    cache = new_cache(base)
    grouped = rows_by_adapter([(adapters[1], 5)], base.device)
    assert grouped[0].rows is None
    logits = base.forward(Step(cache, [], [Chunk(cache.add(), PROMPTS[0])], grouped), list(range(5)))
    assert_close(logits, expected(peft_references[1], PROMPTS[0]))


def test_rows_by_adapter(adapters: list[Adapter], base: BaseModel) -> None:
    a, b = adapters
    groups = rows_by_adapter([(None, 2), (a, 3), (a, 1), (b, 1), (None, 1), (b, 2)], base.device)
    assert [group.adapter for group in groups] == [a, b]
    assert groups[0].rows == slice(2, 6)
    assert isinstance(groups[1].rows, torch.Tensor)
    assert groups[1].rows.tolist() == [6, 8, 9]


def test_rank_stabilised_scaling(base: BaseModel, model_dir: Path, make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter(5, r=4, lora_alpha=6, use_rslora=True)
    adapter = read_adapter("rs", folder, base.module)
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), str(folder)).eval()
    cache = new_cache(base)
    grouped = rows_by_adapter([(adapter, 3)], base.device)
    logits = base.forward(Step(cache, [], [Chunk(cache.add(), PROMPTS[1])], grouped), [0, 1, 2])
    assert_close(logits, expected(alone, PROMPTS[1]))


def test_window_that_the_model_does_not_have(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="above the model's window of 256"):
        BaseModel(model_dir, dtype="float32", max_model_len=100_000)
