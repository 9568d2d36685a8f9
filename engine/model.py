"""The base model: loading, dtype and device, and the packed forward pass."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from engine import attention, lora, packing
from engine.attention import Step
from engine.kv_cache import CacheShape

DtypeName = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request that says nothing gets: the model's generation_config.json, as vLLM does."""

    temperature: float
    top_p: float
    top_k: int


class BaseModel:
    """A causal language model that runs packed steps. One thread at a time."""

    def __init__(self, folder: Path, *, dtype: DtypeName, max_model_len: int | None) -> None:
        """Raises ValueError when the folder's model cannot be served, OSError when it cannot be read."""
        config = AutoConfig.from_pretrained(folder)
        window = getattr(config, "max_position_embeddings", None) or max_model_len
        if window is None:
            raise ValueError(f"{folder} names no context window; give --max-model-len")
        if max_model_len is not None and max_model_len > window:
            raise ValueError(f"--max-model-len {max_model_len} is above the model's window of {window}")
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layers of kind {sorted(kinds)} are not supported")
        self.path = str(folder)
        self.max_length: int = max_model_len or window
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = _dtype(dtype, self.device)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        attention.register()
        transformers_logging.disable_progress_bar()
        self.module: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=self.dtype, attn_implementation=attention.NAME
        )
        if not self.module._supports_attention_backend:
            raise ValueError(f"{type(self.module).__name__} cannot run packed attention")
        torch.nn.Module.to(self.module, self.device)
        self.module.eval().requires_grad_(False)
        packing.pack(self.module)
        lora.install(self.module)
        heads = config.num_attention_heads
        self.cache_shape = CacheShape(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=self.dtype,
            device=self.device,
        )
        generation = self.module.generation_config
        self.stop_ids = _stop_ids(generation, self.tokenizer)
        self.defaults = SamplingDefaults(
            temperature=1.0 if generation.temperature is None else generation.temperature,
            top_p=1.0 if generation.top_p is None else generation.top_p,
            top_k=generation.top_k or 0 if generation.do_sample else 0,
        )

    @torch.inference_mode()
    def forward(self, step: Step, rows: list[int]) -> torch.Tensor:
        """Logits [len(rows), vocabulary] after the packed tokens at `rows`; fills the cache."""
        kept = torch.tensor(rows, dtype=torch.long, device=self.device)
        with attention.running(step):
            output = self.module(
                input_ids=step.tokens,
                position_ids=step.columns.unsqueeze(0),
                logits_to_keep=kept,
                use_cache=False,
            )
        step.advance()
        return output.logits[0]


def _dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    if name == "bfloat16":
        return torch.bfloat16
    if name == "float32":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    # Without these instructions bfloat16 is emulated and slower than float32.
    fast = able.get("amx_bf16", False) or able.get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def _stop_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    declared = generation.eos_token_id
    ids = set(declared if isinstance(declared, list) else [declared])
    ids.add(tokenizer.eos_token_id)
    return frozenset(token for token in ids if token is not None)
