"""Losses of TRL's SDFTTrainer on frozen inputs: `python -m benchmarks.trl_losses FOLDER`.

Reads what `benchmarks.trl_agreement` wrote there and adds `trl.json`. Runs in the interpreter that has TRL.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.trainer.utils import pad

from benchmarks.trl_contender import ALPHA, INSTRUCTION


def main() -> None:
    folder = Path(sys.argv[1])
    inputs = json.loads((folder / "inputs.json").read_text())
    trainer = build(inputs, folder)
    batch, prompts = frozen_batch(trainer, inputs["items"])
    losses = [score(trainer, batch, case) for case in inputs["cases"]]
    (folder / "trl.json").write_text(json.dumps({"losses": losses, "prompts": prompts}))


def build(inputs: dict[str, Any], folder: Path) -> SDFTTrainer:
    base = AutoModelForCausalLM.from_pretrained(inputs["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    rows = [{"prompt": x["messages"], "privileged_context": x["response"]} for x in inputs["items"]]
    return SDFTTrainer(
        model=model,
        args=SDFTConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=len(rows),
            num_generations=1,
            max_prompt_length=None,
            teacher_model_kind="base",
            teacher_prompt_template=INSTRUCTION,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(inputs["base"], padding_side="left"),
    )


def frozen_batch(trainer: SDFTTrainer, items: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Any]]:
    """What TRL makes of the items with their completions in place of samples, and the prompts in tokens."""
    filler = trainer._tokenizer.pad_token_id
    student = trainer._tokenize_prompts([item["messages"] for item in items])
    batch = {}
    for name, rows, side in (
        ("prompt", student, "left"),
        ("completion", [item["completion"] for item in items], "right"),
    ):
        tensors = [torch.tensor(row) for row in rows]
        batch[f"{name}_ids"] = pad(tensors, padding_value=filler, padding_side=side)
        batch[f"{name}_mask"] = pad([torch.ones_like(t) for t in tensors], padding_value=0, padding_side=side)
    batch |= trainer.teacher_context_builder.build(
        [item["messages"] for item in items],
        [item["response"] for item in items],
        batch["completion_ids"],
        batch["completion_mask"],
    )
    width = batch["completion_ids"].shape[1]
    teacher = [
        ids[:-width][mask[:-width].bool()].tolist()
        for ids, mask in zip(batch["teacher_input_ids"], batch["teacher_attention_mask"], strict=True)
    ]
    return batch, [student, teacher]


def score(trainer: SDFTTrainer, batch: dict[str, Any], case: dict[str, Any]) -> dict[str, float]:
    """Loss and gradient norm of one case, by TRL's own `compute_loss`."""
    arguments = trainer.args
    arguments.distillation_alpha = ALPHA.get(case["divergence"], case["jsd_beta"])
    arguments.distillation_mode = "full_logits" if case["top_k"] is None else "topk_logits"
    arguments.distillation_topk = case["top_k"]
    arguments.distillation_add_tail = True
    arguments.teacher_model_kind = case["teacher"]
    trainer.num_loss_tokens_to_skip = case["skip_first"]
    trainer.temperature = case["temperature"]
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    return {"loss": loss.item(), "grad_norm": norm.item()}


if __name__ == "__main__":
    main()
