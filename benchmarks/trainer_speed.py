"""The trainer's speed and memory beside TRL's SDFTTrainer, and what SDFT costs beside supervised training.

    ratchet bench trainer --json
    python -m benchmarks.trainer_speed ...      the same

Contenders are processes that take turns step by step, the first round not counted, so that a machine that
other work slows down slows all of them alike; ratios are medians over the rounds. Progress goes to standard
error; with --json the last line of standard output is the report.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from artifacts import base_models
from benchmarks import trainer_jobs
from benchmarks.contest import ContenderFailed, Unmeasurable
from benchmarks.trainer_cost import cost_of_paper_recipe, cost_of_small_recipe
from benchmarks.trainer_jobs import Setting
from benchmarks.trainer_versus_trl import check_trl, versus_trl
from benchmarks.trl_agreement import Agreement, PromptsDiffer, compare
from domain.errors import RatchetError
from domain.settings import Settings

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "support_route.jsonl"
LONGER_CONTEXTS = 4
VOCABULARIES = (49_152, 150_000)


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    if not options.without_trl:
        check_trl(options.trl_python)
    base = base_models.resolve(options.base, Settings().cache_dir).path
    demonstrations = trainer_jobs.read_demonstrations(options.demonstrations, 96)
    shown = demonstrations[: options.batch_size]
    load_before = os.getloadavg()[0]
    versus: list[dict[str, Any]] = []
    agreement: list[Agreement] = []
    if not options.without_trl:
        recipe = trainer_jobs.contest_recipe(options.batch_size, options.response_tokens, 1)
        tokenizer = AutoTokenizer.from_pretrained(base)
        longer = trainer_jobs.with_longer_responses(tokenizer, shown, LONGER_CONTEXTS, recipe)
        agreement = compare(base, shown[:4], options.trl_python, scratch / "agreement")
        versus.append(versus_trl(Setting("base", base, shown), options, scratch))
        versus.append(versus_trl(Setting("contexts_4x", base, longer), options, scratch))
        for vocabulary in VOCABULARIES:
            random = trainer_jobs.random_base(base, vocabulary, scratch / f"base-{vocabulary}")
            versus.append(versus_trl(Setting(f"vocabulary_{vocabulary}", random, shown), options, scratch))
    cost = [
        measured(Setting("cost", base, demonstrations), options, scratch)
        for measured in (cost_of_small_recipe, cost_of_paper_recipe)
    ]
    return {
        "machine": {
            "cores": os.cpu_count(),
            "threads": options.threads,
            "torch": torch.__version__,
            "load_before": round(load_before, 2),
            "load_after": round(os.getloadavg()[0], 2),
        },
        "batch_size": options.batch_size,
        "response_tokens": options.response_tokens,
        "rounds": options.rounds,
        "versus_trl": versus,
        "agreement": [one._asdict() for one in agreement],
        "largest_loss_difference": max((one.loss_difference for one in agreement), default=None),
        "cost": cost,
        "speedup_vs_trl": versus[0]["speedup"] if versus else None,
        "memory_ratio_vs_trl": versus[0]["memory_ratio"] if versus else None,
        "sdft_over_sft": cost[0]["over_sft"]["update"],
    }


def show(report: dict[str, Any]) -> None:
    """For people: a line for each comparison."""
    for one in report["versus_trl"]:
        ours, theirs = one["ratchet"], one["trl"]
        print(
            f"{one['setting']}: {ours['seconds_per_step']:.2f} s a step, "
            f"TRL's {theirs['seconds_per_step']:.2f} s ({one['speedup']:.2f}x); "
            f"peak above weights {ours['peak_above_weights_mib']} MiB, "
            f"TRL {theirs['peak_above_weights_mib']} MiB ({one['memory_ratio']:.2f})"
        )
    for one in report["cost"]:
        print(
            f"sdft over sft, recipe {one['recipe']}: {one['over_sft']['update']:.2f} "
            f"({one['sdft']['seconds']:.2f} s a step against {one['sft']['seconds']:.2f} s)"
        )
    if report["largest_loss_difference"] is not None:
        print(f"largest difference of losses on equal inputs: {report['largest_loss_difference']:.1e}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ratchet bench trainer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="end with the report on one line")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="built-in name, hub id or folder")
    parser.add_argument("--demonstrations", type=Path, default=EXAMPLES, help="JSONL, 96 rows are read")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a step, at most 96")
    parser.add_argument("--response-tokens", type=int, default=64, help="tokens of every sample")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--without-trl", action="store_true", help="only the cost against sft")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has TRL")
    parser.add_argument("--trl-micro-batch", type=int, help="TRL's sequences a pass; default: all of a step")
    parser.add_argument(
        "--trl-autocast", action="store_true", help="TRL under bfloat16 autocast, its default"
    )
    options = parser.parse_args()
    if options.trl_micro_batch and options.batch_size % options.trl_micro_batch:
        parser.error("--trl-micro-batch must divide --batch-size")
    return options


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as scratch:
        try:
            report = measure(options, Path(scratch))
        except (Unmeasurable, ContenderFailed, PromptsDiffer, RatchetError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if options.json:
        print(json.dumps(report))
    else:
        show(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
