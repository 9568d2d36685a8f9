"""A random Llama of a few thousand weights with a word tokenizer, and adapters that fit it; torch-free."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 16, 32, 2, 2, 258
RANK = 2


def write_base(folder: Path) -> None:
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: at for at, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "chat_template": template,
        },
    )
    _write(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": 256,
            "vocab_size": VOCABULARY,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "eos_token_id": VOCABULARY - 1,
            "pad_token_id": VOCABULARY - 1,
            "bos_token_id": None,
            "torch_dtype": "float32",
        },
    )
    random = np.random.default_rng(7)

    def weights(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.3).astype(np.float32)

    tensors = {"model.embed_tokens.weight": weights(VOCABULARY, HIDDEN), "model.norm.weight": _ones()}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        for name in "qkvo":
            tensors[f"{block}self_attn.{name}_proj.weight"] = weights(HIDDEN, HIDDEN)
        tensors[f"{block}mlp.gate_proj.weight"] = weights(INNER, HIDDEN)
        tensors[f"{block}mlp.up_proj.weight"] = weights(INNER, HIDDEN)
        tensors[f"{block}mlp.down_proj.weight"] = weights(HIDDEN, INNER)
        tensors[f"{block}input_layernorm.weight"] = _ones()
        tensors[f"{block}post_attention_layernorm.weight"] = _ones()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(folder: Path, number: int) -> None:
    """A LoRA adapter on q_proj, different for every version's number."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(number)
    tensors = {}
    for layer in range(LAYERS):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        tensors[f"{key}A.weight"] = random.standard_normal((RANK, HIDDEN)).astype(np.float32)
        tensors[f"{key}B.weight"] = random.standard_normal((HIDDEN, RANK)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _write(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "target_modules": ["q_proj"],
            "bias": "none",
        },
    )


def _ones() -> np.ndarray:
    return np.ones(HIDDEN, dtype=np.float32)


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))
