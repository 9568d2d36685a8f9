"""The small real model, against values measured independently with transformers in float32."""

import os
from pathlib import Path

import pytest
import torch

from artifacts import base_models
from engine.attention import Chunk, Step
from engine.kv_cache import KvCache
from engine.model import BaseModel
from engine.prompts import TokenTexts

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def folder() -> Path:
    cache = Path(os.environ.get("RATCHET_CACHE_DIR", "~/.cache/ratchet")).expanduser()
    return base_models.resolve("smollm2-135m-instruct", cache).path


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.02), ("bfloat16", 0.3)])
def test_first_token_of_an_answer(folder: Path, dtype: str, tolerance: float) -> None:
    base = BaseModel(folder, dtype=dtype, max_model_len=512)  # type: ignore[arg-type]
    texts = TokenTexts(base.tokenizer, base.module.config.vocab_size, base.max_length)
    prompt = texts.prompt_of_chat(QUESTION, add_generation_prompt=True).ids
    cache = KvCache(base.cache_shape, max_rows=2, max_length=512, budget_tokens=2048)
    # Two rows: a prompt in one piece beside the same prompt in two.
    whole, split = cache.add(), cache.add()
    base.forward(Step(cache, [], [Chunk(split, prompt[:20])], []), [0])
    step = Step(cache, [], [Chunk(whole, prompt), Chunk(split, prompt[20:])], [])
    logits = base.forward(step, [len(prompt) - 1, 2 * len(prompt) - 21])
    scores = logits.float().log_softmax(-1)
    the, l_ = (base.tokenizer(text).input_ids[0] for text in ("The", "L"))
    for row in range(2):
        assert scores[row, the].item() == pytest.approx(-1.86, abs=tolerance)
        assert scores[row, l_].item() == pytest.approx(-1.96, abs=tolerance)
    assert scores[0].isfinite().all()


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 layout to pack into"
)
def test_packed_weights_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def logits(base: BaseModel) -> torch.Tensor:
        cache = KvCache(base.cache_shape, max_rows=2, max_length=512, budget_tokens=2048)
        chunks = [Chunk(cache.add(), list(range(100, 100 + length))) for length in (40, 3)]
        return base.forward(Step(cache, [], chunks, []), [39, 42]).float()

    packed = BaseModel(folder, dtype="bfloat16", max_model_len=512)
    assert packed.module.model.layers[0].mlp.up_proj.weight.isnan().all()
    assert packed.module.get_input_embeddings().weight.isfinite().all()
    with monkeypatch.context() as patched:
        patched.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        plain = BaseModel(folder, dtype="bfloat16", max_model_len=512)
    assert plain.module.model.layers[0].mlp.up_proj.weight.isfinite().all()
    torch.testing.assert_close(logits(packed), logits(plain), atol=0.1, rtol=0)
