"""What a step of SDFT costs beside a step of supervised training, by the same trainer."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

from benchmarks import trainer_jobs
from benchmarks.contest import Contender, Step, Unmeasurable, cpu_ratio, paired_ratios, take_turns
from benchmarks.trainer_jobs import Setting
from domain.recipe import Recipe


def cost_of_small_recipe(setting: Setting, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """SDFT over SFT at the recipe that a small base gets: two epochs of one rollout round each.

    The first epoch scores every demonstration, later ones reuse the frozen teacher's states; an update has
    `num_epochs` of them.
    """
    recipe = Recipe.small_model()
    per_step = recipe.batch_size - round(recipe.batch_size * recipe.rehearsal_share)
    epoch = recipe.rollout_every
    demonstrations = setting.demonstrations[: per_step * epoch]
    if len(demonstrations) < per_step * epoch:
        raise Unmeasurable(f"the cost needs {per_step * epoch} demonstrations")
    setting = Setting("small_model", setting.base, demonstrations)
    # No warm-up step: the first epoch is other work than the second.
    recipe = changed(recipe, min_steps=1, max_steps=2 * epoch, on_small_gap="train")
    plain = {"method": "sft", "rehearsal_share": 0.0}
    sdft, sft, bare = measure_cost(
        setting,
        [recipe, changed(recipe, method="sft"), changed(recipe, **plain)],
        2 * epoch,
        options,
        scratch,
    )
    epochs = Recipe.small_model().num_epochs

    def over(other: list[Step]) -> dict[str, float]:
        first = total(sdft[:epoch]) / total(other[:epoch])
        later = total(sdft[epoch:]) / total(other[epoch:])
        whole = (total(sdft[:epoch]) + (epochs - 1) * total(sdft[epoch:])) / (
            total(other[:epoch]) + (epochs - 1) * total(other[epoch:])
        )
        return {
            "first_epoch": round(first, 3),
            "later_epochs": round(later, 3),
            "update": round(whole, 3),
            "cpu_seconds": cpu_ratio(sdft, other),
        }

    return {
        "recipe": "small_model",
        "steps": 2 * epoch,
        "sdft": phases(sdft),
        "sft": phases(sft),
        "sft_without_rehearsal": phases(bare),
        "over_sft": over(sft),
        "over_sft_without_rehearsal": over(bare),
    }


def cost_of_paper_recipe(setting: Setting, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """SDFT over SFT at the paper's recipe with samples and expert responses of about equal length."""
    tokens = options.response_tokens // 2
    tokenizer = AutoTokenizer.from_pretrained(setting.base)
    filler = tokenizer(trainer_jobs.FILLER * tokens, add_special_tokens=False)["input_ids"]
    response = tokenizer.decode(filler[: tokens - 1])  # and the token that ends it
    recipe = Recipe.paper()
    demonstrations = [
        one.model_copy(update={"response": response}) for one in setting.demonstrations[: recipe.batch_size]
    ]
    setting = Setting("paper", setting.base, demonstrations)
    rounds = options.rounds + 1
    recipe = changed(
        trainer_jobs.contest_recipe(recipe.batch_size, tokens, rounds), learning_rate=recipe.learning_rate
    )
    sdft, sft = measure_cost(
        setting, [recipe, changed(recipe, method="sft")], rounds, options, scratch, fixed=True
    )
    return {
        "recipe": "paper",
        "response_tokens": tokens,
        "steps": options.rounds,
        "sdft": phases(sdft[1:]),
        "sft": phases(sft[1:]),
        "over_sft": {
            "update": round(median(paired_ratios(sdft[1:], sft[1:])), 3),
            "cpu_seconds": cpu_ratio(sdft[1:], sft[1:]),
        },
    }


def measure_cost(
    setting: Setting,
    recipes: Sequence[Recipe],
    rounds: int,
    options: argparse.Namespace,
    scratch: Path,
    fixed: bool = False,
) -> list[list[Step]]:
    """Steps of each recipe in turn."""
    print(f"cost at the recipe {setting.name}: sdft and sft", file=sys.stderr)
    with ExitStack() as running:
        contenders = []
        for number, recipe in enumerate(recipes):
            job = trainer_jobs.write_job(setting, recipe, f"{setting.name}-{number}", scratch)
            arguments = ["benchmarks.ratchet_contender", str(job), *(["--fixed-length"] if fixed else [])]
            contender = Contender(f"{recipe.method} {number}", arguments, options.threads)
            contenders.append(running.enter_context(contender))
        take_turns(contenders, rounds)
    return [contender.steps for contender in contenders]


def changed(recipe: Recipe, **fields: Any) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | fields)


def total(steps: Sequence[Step]) -> float:
    return sum(step.seconds for step in steps)


def phases(steps: Sequence[Step]) -> dict[str, float]:
    """Means over the steps, seconds."""
    names = ("seconds", "cpu_seconds", "rollout_seconds", "teacher_seconds", "student_seconds")
    return {name: round(sum(getattr(s, name) for s in steps) / len(steps), 2) for name in names}
