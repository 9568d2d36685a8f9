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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import Asked, BaseReference, BatchCompleter, item_asked
from benchmarks.skill_data import StudiedSkill, evenly_spaced, load_skill
from benchmarks.version_measure import BESIDE
from domain.demonstration import Message
from domain.recipe import Recipe
from domain.rehearsal import general_prompts
from domain.training import PreflightLine, StepLine, TrainerLine, TrainingJob
from evaluation.benchmarks import Benchmark, load_general
from evaluation.suites import measure_general, measure_skill
from trainer.loading import load_model
from trainer.run import train

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
ORDINARY_TOKENS = 40
DRIFT_TOKENS = 32
GENERAL = ("hellaswag", "arc_easy", "piqa", "lambada_openai")
EVERY_ROW = 1_000_000


def general_suite(data: Path, limit: int) -> list[Benchmark]:
    """`limit` evenly spaced questions of each benchmark; none for 0."""
    benchmarks = load_general(data / "prior", GENERAL) if limit else []
    return [Benchmark(b.name, tuple(evenly_spaced(b.questions, limit))) for b in benchmarks]


def measure(
    base: Path, adapter: Path | None, skills: Sequence[StudiedSkill], benchmarks: Sequence[Benchmark]
) -> dict[str, Any]:
    """Accuracy by skill, ordinary answers, KL(base || version) in nats per token, general accuracies."""
    asked = [[Message(role="user", content=question)] for question in ORDINARY]
    model = load_model(base, BESIDE, adapter)
    reference = BaseReference(model, asked, DRIFT_TOKENS)
    completer = BatchCompleter(model)
    items = [item for skill in skills for item in skill.evaluation]
    with model.using(model.parent()):
        completer.prepare_answers(
            [
                *(item_asked(model, item) for item in items),
                *(Asked(messages, ORDINARY_TOKENS, ORDINARY_TOKENS) for messages in asked),
            ]
        )
        completer.prepare_likelihoods(benchmarks)
        drift = reference.kl(model)
    found: dict[str, Any] = {}
    for skill in skills:
        measured = measure_skill(completer, skill.name, skill.teach.grader, skill.evaluation, {})
        found[skill.name] = None if measured is None else round(measured.score, 3)
    found["ordinary"] = [completer.chat(messages, ORDINARY_TOKENS) for messages in asked]
    found["kl"] = round(sum(drift) / len(drift), 4)
    if benchmarks:
        general = measure_general(completer, benchmarks, {})
        found["general"] = {suite.suite: round(suite.score, 4) for suite in general}
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
    parser.add_argument("--parent", type=Path, help="adapter to start from, taught the skills of --taught")
    parser.add_argument("--taught", nargs="*", default=[])
    parser.add_argument("--general", type=int, default=200, help="items per general benchmark; 0 for none")
    parser.add_argument("--keep", type=Path, help="folder for the adapters")
    options = parser.parse_args()

    benchmarks = general_suite(options.data, options.general)
    taught = [load_skill(options.data, name, EVERY_ROW) for name in options.taught]
    if not options.run:
        result = measure(options.base, options.parent, taught, benchmarks)
        print(json.dumps({"name": "measure", "after": result}))
    for name, text in options.run:
        recipe = Recipe.model_validate({**Recipe.small_model().model_dump(), **json.loads(text)})
        known, parent = list(taught), options.parent
        for skill_name in options.skills:
            skill = load_skill(options.data, skill_name, EVERY_ROW)
            earlier = [d.messages for one in known for d in one.teach.train]
            folder = Path(tempfile.mkdtemp(prefix="recipe-search-"))
            job = TrainingJob(
                update_id=name,
                base_path=str(options.base),
                base_model="smollm2-135m-instruct",
                parent_adapter_path=str(parent) if parent else None,
                recipe=recipe,
                skills=[skill.teach],
                rehearsal=[*general_prompts(), *earlier],
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
            known.append(skill)
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
                "teacher_kl": round(sum(s.teacher_kl or 0 for s in steps[-10:]) / len(steps[-10:]), 4),
                "rehearsal_kl": round(sum(s.rehearsal_kl or 0 for s in steps[-10:]) / len(steps[-10:]), 4),
                "after": measure(options.base, folder / "adapter", known, benchmarks),
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
