"""A tiny random Llama with a byte-level tokenizer, made here: no download, milliseconds a step."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from domain.demonstration import Message
from domain.recipe import Recipe
from domain.skill import ExactGrader
from domain.training import SkillToTeach, TrainingJob
from tests.unit.trainer.builders import demonstration

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0, "</s>": 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def skill() -> SkillToTeach:
    return SkillToTeach(
        name="sort",
        grader=ExactGrader(),
        train=[demonstration(f"item {i}", "AB"[i % 2] * 3) for i in range(8)],
        holdout=[demonstration(f"held {i}", "AB"[i % 2] * 3) for i in range(2)],
    )


RECIPE = Recipe(
    learning_rate=5e-3,
    num_epochs=3,
    batch_size=4,
    warmup_steps=1,
    lora_rank=4,
    lora_alpha=8,
    max_new_tokens=6,
    max_rehearsal_tokens=5,
    context="turns",
    num_context_demonstrations=1,
    skip_first_tokens=0,
    off_policy_share=0.5,
    rehearsal_share=0.25,
    rollout_every=2,
    on_small_gap="train",
    checkpoint_every=2,
)


@pytest.fixture
def job(base_folder: Path, tmp_path: Path, skill: SkillToTeach) -> TrainingJob:
    return TrainingJob(
        update_id="up_1",
        base_path=str(base_folder),
        base_model="tiny",
        parent_adapter_path=None,
        recipe=RECIPE,
        skills=[skill],
        rehearsal=[[Message(role="user", content=text)] for text in ("hello", "what is this?", "bye")],
        checkpoint_dir=str(tmp_path / "checkpoints"),
        output_dir=str(tmp_path / "adapter"),
    )


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 whatever the hardware prefers, so that references can be compared tightly."""
    monkeypatch.setattr("trainer.loading.compute_dtype", lambda: torch.float32)
