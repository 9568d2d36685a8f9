"""At equal inputs, are our loss and gradient those of TRL's SDFTTrainer?

Both read the same base, the same adapter with weights that are not zero, the same demonstrations and the same
completions, in float32. TRL runs in an interpreter of its own; ours is a whole step of `trainer.run`, with
the given completions in place of samples, so that contexts, masks and teacher are compared too.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.contest import ROOT
from domain.demonstration import Demonstration
from domain.recipe import Divergence, Recipe
from domain.skill import ContainsGrader
from domain.training import SkillToTeach, StepLine, TrainerLine, TrainingJob
from trainer import loading, material, run
from trainer.contexts import build_lesson
from trainer.model import Model
from trainer.rollout import Sample, Sampling

RANK, ALPHA = 16, 32
COMPLETION_TOKENS = 24
SKILL = "agreement"


@dataclass(frozen=True)
class Case:
    """One mode that both have. `teacher` is TRL's word: `live` is the student without a gradient."""

    name: str
    divergence: Divergence
    jsd_beta: float = 0.5
    skip_first: int = 0
    temperature: float = 1.0
    teacher: str = "base"
    top_k: int | None = None
    """Over the student's most probable tokens and one tail bucket; None is the whole vocabulary."""

    def recipe(self, sequences: int) -> Recipe:
        return Recipe(
            batch_size=sequences,
            max_steps=1,
            lora_rank=RANK,
            lora_alpha=ALPHA,
            divergence=self.divergence,
            jsd_beta=self.jsd_beta,
            skip_first_tokens=self.skip_first,
            temperature=self.temperature,
            # At the first step the student is the version that it starts from.
            teacher="base" if self.teacher == "base" else "parent",
            divergence_top_k=self.top_k,
            top_k_support="student",
            max_new_tokens=COMPLETION_TOKENS,
            on_small_gap="train",
            kl_to_base_every=0,
        )


CASES = (
    Case("forward KL", "forward"),
    Case("forward KL, first 3 tokens skipped", "forward", skip_first=3),
    Case("forward KL, temperature 0.7", "forward", temperature=0.7),
    Case("forward KL, live teacher", "forward", teacher="live"),
    Case("reverse KL", "reverse"),
    Case("reverse KL, live teacher", "reverse", teacher="live"),
    Case("JSD 0.5", "jsd", jsd_beta=0.5),
    Case("JSD 0.3", "jsd", jsd_beta=0.3),
    Case("forward KL, top 20 and tail", "forward", top_k=20),
    Case("reverse KL, top 20 and tail", "reverse", top_k=20),
)


class Agreement(NamedTuple):
    case: str
    loss: float
    trl_loss: float
    loss_difference: float
    grad_norm: float
    trl_grad_norm: float


class PromptsDiffer(Exception):
    """TRL showed student or teacher other tokens than we did: the losses would not be comparable."""


def compare(
    base: Path, demonstrations: Sequence[Demonstration], trl_python: str, scratch: Path
) -> list[Agreement]:
    """Loss and gradient norm of every case, ours and TRL's, on the same inputs.

    Raises PromptsDiffer, or CalledProcessError when TRL's process fails.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    write_adapter(base, scratch / "adapter")
    completions = draw_completions(base, len(demonstrations))
    items = [
        {"messages": [m.model_dump() for m in one.messages], "response": one.response, "completion": tokens}
        for one, tokens in zip(demonstrations, completions, strict=True)
    ]
    inputs = {"base": str(base), "items": items, "cases": [asdict(case) for case in CASES]}
    (scratch / "inputs.json").write_text(json.dumps(inputs))
    subprocess.run(
        [trl_python, "-m", "benchmarks.trl_losses", str(scratch)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    theirs = json.loads((scratch / "trl.json").read_text())
    check_prompts(base, demonstrations, theirs["prompts"])
    found = []
    for case, other in zip(CASES, theirs["losses"], strict=True):
        step = our_step(base, demonstrations, completions, case, scratch)
        difference = abs(step.loss - other["loss"])
        found.append(
            Agreement(case.name, step.loss, other["loss"], difference, step.grad_norm, other["grad_norm"])
        )
    return found


def write_adapter(base: Path, folder: Path) -> None:
    """A PEFT adapter whose A and B are both random, so that the student is neither the base nor near it."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)


def draw_completions(base: Path, count: int) -> list[list[int]]:
    """Random tokens in lengths that differ; the first tokens of a vocabulary are its special ones."""
    vocabulary = AutoModelForCausalLM.from_pretrained(base).config.vocab_size
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(50, vocabulary, (COMPLETION_TOKENS - 5 * (index % 4),), generator=generator).tolist()
        for index in range(count)
    ]


def check_prompts(base: Path, demonstrations: Sequence[Demonstration], theirs: list[Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    recipe = CASES[0].recipe(len(demonstrations))
    lessons = [build_lesson(tokenizer, SKILL, one, [], recipe) for one in demonstrations]
    ours = [[one.prompt for one in lessons], [one.teacher_prompt for one in lessons]]
    for who, our_rows, their_rows in zip(("student", "teacher"), ours, theirs, strict=True):
        for number, (mine, other) in enumerate(zip(our_rows, their_rows, strict=True), start=1):
            if mine != other:
                raise PromptsDiffer(f"the {who}'s prompt of demonstration {number}: {mine} and TRL's {other}")


def our_step(
    base: Path,
    demonstrations: Sequence[Demonstration],
    completions: Sequence[list[int]],
    case: Case,
    scratch: Path,
) -> StepLine:
    """One step of the trainer in float32, on the given completions."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    recipe = case.recipe(len(demonstrations))
    given = {
        tuple(build_lesson(tokenizer, SKILL, one, [], recipe).prompt): tokens
        for one, tokens in zip(demonstrations, completions, strict=True)
    }

    def recall(
        model: Model, prompts: Sequence[list[int]], limits: Sequence[int], sampling: Sampling
    ) -> list[Sample]:
        drawn = [given[tuple(prompt)] for prompt in prompts]
        return [Sample(tokens, truncated=False, logprobs=[0.0] * len(tokens)) for tokens in drawn]

    job = TrainingJob(
        update_id="agreement",
        base_path=str(base),
        base_model="agreement",
        parent_adapter_path=str(scratch / "adapter"),
        recipe=recipe,
        skills=[SkillToTeach(name=SKILL, grader=ContainsGrader(), train=list(demonstrations), holdout=[])],
        checkpoint_dir=str(scratch / "checkpoints"),
        output_dir=str(scratch / "trained"),
    )
    lines: list[TrainerLine] = []
    with (
        patch.object(material, "sample", recall),
        patch.object(loading, "compute_dtype", lambda: torch.float32),
    ):
        run.train(job, lines.append, lambda: False)
    (step,) = [line for line in lines if isinstance(line, StepLine)]
    return step
