"""Ratchet's trainer as a contender: `python -m benchmarks.ratchet_contender JOB.json [--fixed-length]`."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import process_memory
from benchmarks.contest import Turns
from domain.training import PreflightLine, StepLine, TrainerLine, TrainingJob
from trainer import material, run
from trainer.model import Model, compute_dtype
from trainer.rollout import Sample, Sampling


def fix_length() -> None:
    """Samples have exactly `max_new_tokens` tokens and count in the loss, as the peer's are made to: no
    token ends an answer."""
    draw = material.sample

    def sample(
        model: Model, prompts: Sequence[list[int]], limits: Sequence[int], sampling: Sampling
    ) -> list[Sample]:
        model.stop_ids = frozenset()
        return [replace(one, truncated=False) for one in draw(model, prompts, limits, sampling)]

    material.sample = sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("--fixed-length", action="store_true")
    options = parser.parse_args()
    job = TrainingJob.model_validate_json(options.job.read_text())
    turns = Turns()
    dtype = str(compute_dtype()).removeprefix("torch.")
    process_memory.after_loading_weights(lambda rss: turns.say("loaded", rss=rss, dtype=dtype))
    if options.fixed_length:
        fix_length()
    started = used = 0.0

    def emit(line: TrainerLine) -> None:
        nonlocal started, used
        if isinstance(line, PreflightLine):
            process_memory.forget_peak()
            turns.say("ready")
        elif isinstance(line, StepLine):
            turns.say(
                "step",
                seconds=time.monotonic() - started,
                cpu_seconds=time.process_time() - used,
                rollout_seconds=line.rollout_seconds,
                teacher_seconds=line.teacher_seconds,
                student_seconds=line.student_seconds,
                response_tokens=line.response_tokens,
                loss=line.loss,
                peak_rss=process_memory.peak(),
            )
        else:
            return
        turns.wait()
        started, used = time.monotonic(), time.process_time()

    run.train(job, emit, lambda: False)


if __name__ == "__main__":
    main()
