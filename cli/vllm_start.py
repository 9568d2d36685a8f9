"""How vLLM is started for one base model: its command line and environment.

What each flag is for, and which behaviour of vLLM it answers, is in docs/serving.md; tests/vllm holds the
behaviours themselves.
"""

import json
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from domain.settings import Settings

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What serving's validation lets adapters target. Named, so that the output layer is not one of them: with
it, prompt log-probabilities end a CPU engine."""
CPU_CACHE_GIB = "1"
CPU_BLOCK = "32"
"""Tokens in a piece of vLLM's prefix cache. Its default of 128 on a CPU is longer than what most prompts have
in common, and nothing would be found there."""
CPU_STEP = "64"
"""Tokens of one step, and so requests at a time. With adapters a prompt's tokens cost as much as generated
ones: with vLLM's default of 2048 one step reads the prompts of all clients that came together, and for those
many seconds nobody gets a token and no adapter is loaded."""
GPU_MEMORY = "0.45"
"""Share of the card: the trainer needs the rest."""
WORKER_FOLDER = Path(__file__).parent / "vllm_worker"
WORKER_EXTENSION = "ratchet_seeds.Worker"
"""In WORKER_FOLDER: keeps a CPU engine alive when a prompt that comes with a seed takes several steps."""
BARE = "bare:"
"""Before the name of a base that is served through an adapter of zeros."""


def command(settings: Settings, base_model: str, folder: Path, port: str, *, gpu: bool) -> list[str]:
    """`folder` holds the base model, which is served as `base_model`.

    On the CPU vLLM gives requests for the bare base the adapter in its last slot, when they share a batch
    with an adapter's. There `base_model` is an adapter of zeros, which is written below the home, and
    nobody asks for the bare base.
    """
    extra = shlex.split(settings.vllm_args)
    made = [str(settings.vllm_python), "-m", "vllm.entrypoints.openai.api_server"]
    made += ["--model", str(folder), "--host", "127.0.0.1", "--port", port]
    made += ["--disable-uvicorn-access-log", "--enable-lora"]
    made += ["--max-lora-rank", str(settings.engine_max_rank), "--lora-target-modules", *LORA_MODULES]
    made += ["--scheduling-policy", "priority"]
    own = 0 if gpu else 1
    made += ["--max-loras", str(settings.engine_batch_adapters + own)]
    made += ["--max-cpu-loras", str(settings.engine_adapters + own)]
    if gpu:
        made += ["--served-model-name", base_model, "--gpu-memory-utilization", GPU_MEMORY]
    else:
        zeros = zero_adapter(
            settings.home / "zero-adapters" / base_model.strip("/").replace("/", "--"), folder
        )
        card = {"name": base_model, "path": str(zeros), "base_model_name": BARE + base_model}
        made += ["--served-model-name", BARE + base_model, "--lora-modules", json.dumps(card)]
        made.append("--enforce-eager")  # adapters rule compilation out anyway: 80 s less to start
        made += ["--block-size", CPU_BLOCK, "--max-num-batched-tokens", CPU_STEP, "--max-num-seqs", CPU_STEP]
        made += ["--worker-extension-cls", WORKER_EXTENSION]
    return made + extra


def environment(given: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """`given` with the workers' extension for an import path instead of Ratchet's own; what the user set for
    vLLM stays."""
    made = {**given, "PYTHONPATH": str(WORKER_FOLDER)}
    made["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    made["VLLM_NO_USAGE_STATS"] = "1"
    made["HF_HUB_OFFLINE"] = "1"
    made.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
    # vLLM's own binding takes a core for itself alone: here the trainer shares them all.
    made.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    made["OMP_NUM_THREADS"] = str(settings.engine_threads)
    return made


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers: then `make vllm` has installed the CUDA build."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0


def zero_adapter(target: Path, base: Path) -> Path:
    """`target`, holding an adapter of rank 1 that changes nothing: every q_proj's, all zeros.

    One that exists is left alone, since an engine may read it at any moment.
    """
    if target.exists():
        return target
    config = json.loads((base / "config.json").read_bytes())
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    outputs = heads * int(config.get("head_dim") or hidden // heads)
    header: dict[str, Any] = {}
    position = 0
    for layer in range(int(config["num_hidden_layers"])):
        for side, shape in (("A", [1, hidden]), ("B", [outputs, 1])):
            end = position + 2 * shape[0] * shape[1]
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    adapter = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "bias": "none"}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
        staging = Path(scratch) / "adapter"
        staging.mkdir()
        (staging / "adapter_config.json").write_text(json.dumps(adapter))
        weights = struct.pack("<Q", len(text)) + text + bytes(position)
        (staging / "adapter_model.safetensors").write_bytes(weights)
        staging.rename(target)
    return target
