"""Ratchet's trainer beside TRL's SDFTTrainer: the same job, step by step in turn."""

import argparse
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

from benchmarks import trainer_jobs
from benchmarks.contest import Contender, Unmeasurable, cpu_ratio, paired_ratios, take_turns
from benchmarks.trainer_jobs import Setting

TRL_VERSION = "1.16.0"
MIB = 1 << 20


def check_trl(python: str) -> None:
    """Raises Unmeasurable unless `python` has the version of TRL that the figures are about."""
    command = "import importlib.metadata as m; print(m.version('trl'))"
    found = subprocess.run([python, "-c", command], capture_output=True, text=True, check=False)
    if found.returncode or found.stdout.strip() != TRL_VERSION:
        has = f"TRL {found.stdout.strip()}" if found.returncode == 0 else "no TRL"
        raise Unmeasurable(
            f"{python} has {has}; the comparison is with TRL {TRL_VERSION}. Install the extra 'bench', name "
            "an interpreter that has it with --trl-python, or measure without it: --without-trl"
        )


def versus_trl(setting: Setting, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Steps of Ratchet and of TRL in turn, at one setting."""
    print(f"{setting.name}: ratchet and trl", file=sys.stderr)
    recipe = trainer_jobs.contest_recipe(options.batch_size, options.response_tokens, options.rounds + 1)
    job = trainer_jobs.write_job(setting, recipe, setting.name, scratch)
    tokenizer = AutoTokenizer.from_pretrained(setting.base)
    student, teacher = trainer_jobs.prompt_tokens(tokenizer, setting.demonstrations, recipe)
    with ExitStack() as running:
        ours = running.enter_context(
            Contender(
                "ratchet", ["benchmarks.ratchet_contender", str(job), "--fixed-length"], options.threads
            )
        )
        arguments = ["benchmarks.trl_contender", str(job), "--dtype", ours.dtype]
        arguments += ["--micro-batch", str(options.trl_micro_batch or options.batch_size)]
        arguments += ["--autocast"] if options.trl_autocast else []
        theirs = running.enter_context(Contender("trl", arguments, options.threads, options.trl_python))
        take_turns([ours, theirs], options.rounds + 1)
    for contender in (ours, theirs):
        lengths = {step.response_tokens for step in contender.steps}
        if lengths != {options.response_tokens}:
            raise Unmeasurable(f"{contender.name} drew responses of {lengths} tokens: nothing to compare")
    ratios = paired_ratios(theirs.steps[1:], ours.steps[1:])
    return {
        "setting": setting.name,
        "student_prompt_tokens": round(student, 1),
        "teacher_prompt_tokens": round(teacher, 1),
        "dtype": ours.dtype,
        "ratchet": figures(ours, recipe.batch_size),
        "trl": figures(theirs, recipe.batch_size),
        "speedup": round(median(ratios), 3),
        "speedup_by_round": ratios,
        "speedup_in_cpu_seconds": cpu_ratio(theirs.steps[1:], ours.steps[1:]),
        "memory_ratio": round(ours.peak_above_weights / theirs.peak_above_weights, 3),
    }


def figures(contender: Contender, batch_size: int) -> dict[str, Any]:
    steps = contender.steps[1:]
    seconds = median(step.seconds for step in steps)
    return {
        "seconds_per_step": round(seconds, 2),
        "cpu_seconds_per_step": round(median(step.cpu_seconds for step in steps), 2),
        "response_tokens_per_second": round(
            batch_size * median(s.response_tokens for s in steps) / seconds, 1
        ),
        "rollout_seconds": round(median(step.rollout_seconds for step in steps), 2),
        "teacher_seconds": round(median(step.teacher_seconds for step in steps), 2),
        "student_seconds": round(median(step.student_seconds for step in steps), 2),
        "weights_rss_mib": contender.weights_rss // MIB,
        "peak_above_weights_mib": contender.peak_above_weights // MIB,
    }
