"""The jobs that the trainer benchmark runs: what is the same for every contender is written here once."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from benchmarks.contest import Unmeasurable
from domain.demonstration import Demonstration, Message
from domain.recipe import Recipe
from domain.rehearsal import general_prompts
from domain.skill import ContainsGrader
from domain.training import SkillToTeach, TrainingJob
from trainer.contexts import build_lesson

FILLER = " Check the order, the date and the amount before you answer, and name one thing only."


@dataclass(frozen=True)
class Setting:
    """One comparison: a base and demonstrations."""

    name: str
    base: Path
    demonstrations: list[Demonstration]


def read_demonstrations(file: Path, count: int) -> list[Demonstration]:
    """The first `count` rows, prompts with short labels as responses.

    Raises Unmeasurable when the file has fewer.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(rows) < count:
        raise Unmeasurable(f"{file} has {len(rows)} demonstrations; {count} are needed")
    return [
        Demonstration(
            messages=[Message(role="user", content=row["prompt"])],
            response=row["response"],
            answer=row["response"],
        )
        for row in rows[:count]
    ]


def contest_recipe(batch_size: int, response_tokens: int, steps: int) -> Recipe:
    """The paper's recipe with fixed lengths, every demonstration in every step, and no pauses between
    steps that a peer does not make."""
    return Recipe(
        batch_size=batch_size,
        num_epochs=steps,
        max_steps=steps,
        max_new_tokens=response_tokens,
        on_small_gap="train",
        checkpoint_every=steps + 1,
        kl_to_base_every=0,
    )


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], recipe: Recipe
) -> tuple[float, float]:
    """Mean length of the student's and of the teacher's prompts, in tokens."""
    lessons = [build_lesson(tokenizer, "benchmark", one, [], recipe) for one in demonstrations]
    count = len(lessons)
    return sum(len(x.prompt) for x in lessons) / count, sum(len(x.teacher_prompt) for x in lessons) / count


def with_longer_responses(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], factor: int, recipe: Recipe
) -> list[Demonstration]:
    """The same prompts with expert responses so long that the teacher's prompts have `factor` times the
    tokens; the student never sees them."""
    added = len(tokenizer(FILLER, add_special_tokens=False)["input_ids"])
    _, mean = prompt_tokens(tokenizer, demonstrations, recipe)
    times = round((factor - 1) * mean / added)
    return [one.model_copy(update={"response": one.response + FILLER * times}) for one in demonstrations]


def random_base(like: Path, vocabulary: int, folder: Path) -> Path:
    """A base of the same architecture with random weights, `vocabulary` tokens and the same tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(like)
    config.vocab_size = vocabulary
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in like.glob("*token*"):
        shutil.copy(file, folder)
    for name in ("chat_template.jinja", "vocab.json", "merges.txt"):
        if (like / name).exists():
            shutil.copy(like / name, folder)
    return folder


def write_job(setting: Setting, recipe: Recipe, name: str, scratch: Path) -> Path:
    """A job file; `name` keeps what the job writes apart from other jobs'."""
    job = TrainingJob(
        update_id=name,
        base_path=str(setting.base),
        base_model="benchmark",
        parent_adapter_path=None,
        recipe=recipe,
        skills=[
            SkillToTeach(name="benchmark", grader=ContainsGrader(), train=setting.demonstrations, holdout=[])
        ],
        rehearsal=general_prompts() if recipe.rehearsal_share else [],
        checkpoint_dir=str(scratch / name / "checkpoints"),
        output_dir=str(scratch / name / "adapter"),
    )
    file = scratch / f"{name}.json"
    file.write_text(job.model_dump_json())
    return file
