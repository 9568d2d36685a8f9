"""TRL's SDFTTrainer as a contender: `python -m benchmarks.trl_contender JOB.json --dtype bfloat16`.

Runs in the interpreter that has TRL, which need not be ours: it reads the job as plain JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from benchmarks import process_memory
from benchmarks.contest import Turns

INSTRUCTION = (
    "{prompt}\n\nThis is an example for a response to the question:\n{privileged_context}\n\n"
    "Now answer with a response of your own, including the thinking process."
)
ALPHA = {"forward": 0.0, "reverse": 1.0}


def config(job: dict[str, Any], micro_batch: int, autocast: bool) -> SDFTConfig:
    """The job's recipe in TRL's words; where a default of TRL's differs from ours it is named here."""
    recipe = job["recipe"]
    length = recipe["max_new_tokens"]
    return SDFTConfig(
        output_dir=job["output_dir"],
        use_cpu=not torch.cuda.is_available(),
        bf16=autocast,
        gradient_checkpointing=False,
        disable_dropout=True,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=recipe["batch_size"] // micro_batch,
        num_generations=1,
        max_prompt_length=None,
        max_completion_length=length,
        generation_kwargs={"min_new_tokens": length},
        temperature=recipe["temperature"],
        distillation_mode="full_logits",
        distillation_alpha=ALPHA[recipe["divergence"]],
        num_loss_tokens_to_skip=recipe["skip_first_tokens"],
        teacher_model_kind=recipe["teacher"],
        teacher_update_rate=recipe["teacher_update_rate"],
        teacher_prompt_template=INSTRUCTION,
        learning_rate=recipe["learning_rate"],
        lr_scheduler_type=recipe["lr_schedule"],
        warmup_steps=recipe["warmup_steps"],
        weight_decay=recipe["weight_decay"],
        max_grad_norm=recipe["max_grad_norm"],
        max_steps=recipe["max_steps"],
        seed=recipe["seed"],
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def dataset(job: dict[str, Any]) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": one["messages"], "privileged_context": one["response"]}
            for skill in job["skills"]
            for one in skill["train"]
        ]
    )


def adapter(job: dict[str, Any]) -> LoraConfig:
    recipe = job["recipe"]
    return LoraConfig(
        r=recipe["lora_rank"],
        lora_alpha=recipe["lora_alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


class Phases:
    """Seconds of the current step in generation, in the teacher's pass and in all the rest."""

    def __init__(self, trainer: SDFTTrainer) -> None:
        self.rollout = self.teacher = 0.0
        trainer._generate = self._timed(trainer._generate, "rollout")
        forward = trainer._forward_logits
        scored = self._timed(forward, "teacher")

        def route(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits: torch.Tensor = (forward if torch.is_grad_enabled() else scored)(*args, **kwargs)
            return logits

        trainer._forward_logits = route

    def _timed(self, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.monotonic()
            found = call(*args, **kwargs)
            setattr(self, phase, getattr(self, phase) + time.monotonic() - started)
            return found

        return timed


class TakeTurns(TrainerCallback):
    def __init__(self, turns: Turns, trainer: SDFTTrainer) -> None:
        self._turns, self._trainer, self._phases = turns, trainer, Phases(trainer)
        self._started = self._used = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self._started:
            process_memory.forget_peak()
            self._turns.say("ready")
        self._turns.wait()
        self._phases.rollout = self._phases.teacher = 0.0
        self._started, self._used = time.monotonic(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds = time.monotonic() - self._started
        phases, metrics = self._phases, self._trainer._metrics["train"]
        self._turns.say(
            "step",
            seconds=seconds,
            cpu_seconds=time.process_time() - self._used,
            rollout_seconds=phases.rollout,
            teacher_seconds=phases.teacher,
            student_seconds=seconds - phases.rollout - phases.teacher,
            response_tokens=metrics["completions/mean_length"][-1],
            loss=metrics["self_distillation/distillation_loss"][-1],
            peak_rss=process_memory.peak(),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--autocast", action="store_true")
    options = parser.parse_args()
    job = json.loads(options.job.read_text())
    turns = Turns()
    process_memory.after_loading_weights(
        lambda rss: turns.say("loaded", rss=rss, dtype=str(model_dtype).removeprefix("torch."))
    )
    model_dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(job["base_path"], dtype=model_dtype)
    trainer = SDFTTrainer(
        model=model,
        args=config(job, options.micro_batch, options.autocast),
        train_dataset=dataset(job),
        processing_class=AutoTokenizer.from_pretrained(job["base_path"], padding_side="left"),
        peft_config=adapter(job),
    )
    # After the callback that updates TRL's teacher, so that its time is in the step.
    trainer.add_callback(TakeTurns(turns, trainer))
    trainer.train()


if __name__ == "__main__":
    main()
