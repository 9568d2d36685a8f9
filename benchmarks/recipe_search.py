"""Train recipes on the shared skills and measure what they learn, keep and leak.

    python benchmarks/recipe_search.py --data ../shared/data --base DIR --out runs.jsonl \\
        --run NAME '{"learning_rate": 0.002}' --skills banking_intent clinc_route

Each run trains the skills in sequence (the second on top of the first, its training prompts joined to the
rehearsal prompts), answers the eval files greedily, scores the general suite by log-likelihood and appends
one line to `--out`. Measurement uses the trainer's own generation; the numbers that count are those of
`ratchet demo`, through the gateway.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional

from domain.demonstration import Demonstration, Message
from domain.grading import grade
from domain.recipe import Recipe
from domain.skill import RegexGrader
from domain.training import PreflightLine, SkillToTeach, StepLine, TrainerLine, TrainingJob
from trainer.contexts import chat_tokens
from trainer.divergence import forward_kl
from trainer.loading import load_model
from trainer.loss import divergence_loss
from trainer.model import Model
from trainer.rollout import GREEDY, Sampling, sample
from trainer.run import train
from trainer.sequences import all_response_states

ORDINARY = [
    "What is the capital of Italy?",
    "Write one sentence about the sea.",
    "Why is the sky blue?",
    "Give me three tips for sleeping better.",
    "Translate 'good morning' into French.",
    "What should I cook tonight with eggs and rice?",
    "Who wrote Romeo and Juliet?",
    "My bank card is blue. What colour is my bank card?",
    "Explain photosynthesis to a child.",
    "Is 17 a prime number?",
]
"""Never trained on."""


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def load_skill(data: Path, name: str, holdout: int) -> tuple[SkillToTeach, list[Demonstration]]:
    """Train split with `holdout` dev rows as held-out items, and the eval split."""

    def demonstrations(split: str) -> list[Demonstration]:
        return [
            Demonstration(
                messages=[Message(role="user", content=row["prompt"])],
                response=row["demonstration"],
                answer=row["answer"],
            )
            for row in rows(data / "skills" / f"{name}.{split}.jsonl")
        ]

    pattern = rows(data / "skills" / f"{name}.train.jsonl")[0]["grader"]["pattern"]
    skill = SkillToTeach(
        name=name,
        grader=RegexGrader(pattern=pattern),
        train=demonstrations("train"),
        holdout=demonstrations("dev")[:holdout],
    )
    return skill, demonstrations("eval")


def answers(model: Model, prompts: list[list[Message]], max_new_tokens: int) -> list[str]:
    tokens = [chat_tokens(model.tokenizer, messages) for messages in prompts]
    drawn = sample(model, tokens, [max_new_tokens] * len(tokens), GREEDY)
    return [model.text(s.tokens) for s in drawn]


def accuracy(model: Model, skill: SkillToTeach, items: list[Demonstration]) -> float:
    texts = answers(model, [d.messages for d in items], 32)
    return sum(grade(skill.grader, t, d.answer) for t, d in zip(texts, items, strict=True)) / len(items)


@torch.no_grad()
def continuation_scores(model: Model, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Sum log-probability of each continuation after its prefix, and whether it is the greedy one."""
    encoded = []
    for prefix, continuation in pairs:
        before = model.tokenizer(prefix, add_special_tokens=False)["input_ids"]
        whole = model.tokenizer(prefix + continuation, add_special_tokens=False)["input_ids"]
        encoded.append((whole[: len(before)], whole[len(before) :]))
    found: dict[int, tuple[float, bool]] = {}
    for index, states in enumerate(all_response_states(model, encoded)):
        logp = torch.log_softmax(functional.linear(states, model.head).float(), -1)
        target = torch.tensor(encoded[index][1])
        total = logp.gather(1, target[:, None]).sum().item()
        found[index] = total, bool((logp.argmax(-1) == target).all())
    return [found[i] for i in range(len(pairs))]


@torch.no_grad()
def ordinary_kl(model: Model) -> float:
    """Mean forward KL, base to version, in nats per token of the base's own samples to ORDINARY."""
    prompts = [chat_tokens(model.tokenizer, [Message(role="user", content=q)]) for q in ORDINARY]
    with model.using(None):
        drawn = sample(model, prompts, [32] * len(prompts), Sampling(1.0))
        rows = [(prompt, answer.tokens) for prompt, answer in zip(prompts, drawn, strict=True)]
        base = torch.cat(all_response_states(model, rows))
    with model.using(model.parent()):
        version = torch.cat(all_response_states(model, rows))
    weights = torch.full((len(base),), 1 / len(base))
    return divergence_loss(version, base, model.head, weights, 1.0, forward_kl).total.item()


def general_suite(model: Model, data: Path, limit: int) -> dict[str, float]:
    """Accuracy by benchmark: choice (length-normalised but for arc_easy), and greedy for lambada."""
    scores: dict[str, float] = {}
    for name, normalise in (("hellaswag", True), ("arc_easy", False), ("piqa", True)):
        items = rows(data / "prior" / f"{name}.dev.jsonl")[:limit]
        suffix = "" if name == "hellaswag" else "\nAnswer:"
        pairs = [
            (item["query"].rstrip() + suffix, " " + choice) for item in items for choice in item["choices"]
        ]
        flat = iter(zip(pairs, continuation_scores(model, pairs), strict=True))
        right = 0
        for item in items:
            options = [next(flat) for _ in item["choices"]]
            values = [s / (len(c) if normalise else 1) for (_, c), (s, _) in options]
            right += values.index(max(values)) == item["gold"]
        scores[name] = right / len(items)
    items = rows(data / "prior" / "lambada_openai.dev.jsonl")[:limit]
    found = continuation_scores(model, [(i["context"], " " + i["continuation"]) for i in items])
    scores["lambada"] = sum(greedy for _, greedy in found) / len(items)
    scores["mean"] = sum(scores.values()) / 4
    return scores


def measure(
    base: Path,
    adapter: Path | None,
    skills: list[tuple[SkillToTeach, list[Demonstration]]],
    data: Path,
    limit: int,
) -> dict:
    model = load_model(base, Recipe(teacher="base"), adapter)
    with model.using(model.parent()):
        found: dict = {skill.name: round(accuracy(model, skill, items), 3) for skill, items in skills}
        asked = [[Message(role="user", content=question)] for question in ORDINARY]
        found["ordinary"] = answers(model, asked, 40)
        found["kl"] = round(ordinary_kl(model), 4)
        if limit:
            model.use(model.parent())
            found["general"] = {k: round(v, 4) for k, v in general_suite(model, data, limit).items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", nargs=2, action="append", default=[], metavar=("NAME", "RECIPE"))
    parser.add_argument("--skills", nargs="+", default=["banking_intent", "clinc_route"])
    parser.add_argument("--rehearsal", type=Path, default=Path("domain/rehearsal_prompts.jsonl"))
    parser.add_argument("--parent", type=Path, help="adapter to start from, taught the skills of --taught")
    parser.add_argument("--taught", nargs="*", default=[])
    parser.add_argument("--general", type=int, default=200, help="items per general benchmark; 0 for none")
    parser.add_argument("--keep", type=Path, help="folder for the adapters")
    options = parser.parse_args()

    general = [[Message(role="user", content=row["prompt"])] for row in rows(options.rehearsal)]
    taught = [load_skill(options.data, name, 32) for name in options.taught]
    if not options.run:
        result = measure(options.base, options.parent, taught, options.data, options.general)
        print(json.dumps({"name": "measure", "after": result}))
    for name, text in options.run:
        recipe = Recipe.model_validate({**Recipe.small_model().model_dump(), **json.loads(text)})
        known, parent = list(taught), options.parent
        for skill_name in options.skills:
            skill, items = load_skill(options.data, skill_name, 32)
            earlier = [d.messages for s, _ in known for d in s.train]
            folder = Path(tempfile.mkdtemp(prefix="recipe-search-"))
            job = TrainingJob(
                update_id=name,
                base_path=str(options.base),
                base_model="smollm2-135m-instruct",
                parent_adapter_path=str(parent) if parent else None,
                recipe=recipe,
                skills=[skill],
                rehearsal=[*general, *earlier],
                checkpoint_dir=str(folder / "checkpoints"),
                output_dir=str(folder / "adapter"),
            )
            lines: list[TrainerLine] = []

            def emit(line: TrainerLine, lines: list[TrainerLine] = lines) -> None:
                lines.append(line)
                if isinstance(line, PreflightLine) or (isinstance(line, StepLine) and line.step % 5 == 0):
                    print(line.model_dump_json(), flush=True)

            started = time.monotonic()
            train(job, emit, lambda: False)
            seconds = time.monotonic() - started
            known.append((skill, items))
            steps = [line for line in lines if isinstance(line, StepLine)]
            result = {
                "name": name,
                "skill": skill_name,
                "changes": json.loads(text),
                "steps": len(steps),
                "seconds": round(seconds, 1),
                "per_step": {
                    phase: round(sum(getattr(s, f"{phase}_seconds") for s in steps) / len(steps), 2)
                    for phase in ("rollout", "teacher", "student")
                },
                "teacher_kl": round(sum(s.teacher_kl for s in steps[-10:]) / len(steps[-10:]), 4),
                "rehearsal_kl": round(sum(s.rehearsal_kl or 0 for s in steps[-10:]) / len(steps[-10:]), 4),
                "after": measure(options.base, folder / "adapter", known, options.data, options.general),
            }
            with options.out.open("a") as out:
                out.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
            parent = folder / "adapter"
            if options.keep:
                kept = options.keep / f"{name}-{skill_name}"
                shutil.copytree(parent, kept, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
