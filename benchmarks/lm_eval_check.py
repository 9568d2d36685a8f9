"""lm-eval against a running gateway, held against Ratchet's own measurement of the same items.

`python -m benchmarks.lm_eval_check --url http://127.0.0.1:8400 --model support@v0 --tokenizer FOLDER`
asks the same version twice: through lm-eval's `local-completions` and `local-chat-completions`, and through
`evaluation.suites` as an update does. Item by item it compares log-likelihoods of options, which option won,
and generated text. Exit status 1 when they disagree by more than is allowed.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from domain.demonstration import DemonstrationLine, Message
from domain.measurement import Likelihood
from domain.skill import ExactGrader
from evaluation.benchmarks import Benchmark, load_general
from evaluation.suites import SkillItem, measure_general, measure_skill
from serving.client import EngineClient

TASKS = Path(__file__).parent / "lm_eval_tasks"
EXAMPLES = Path(__file__).parents[1] / "examples"
SCORED = {
    "ratchet_commonsense": ("commonsense", "acc_norm"),
    "ratchet_last_word": ("last_word", "acc"),
    "sdft_arc_easy": ("arc_easy", "acc_norm"),
    "sdft_hellaswag": ("hellaswag", "acc_norm"),
    "sdft_lambada": ("lambada_openai", "acc"),
    "sdft_winogrande": ("winogrande", "acc"),
}
"""lm-eval task -> Ratchet's benchmark of the same items and prompts, and the metric that it scores by."""
GENERATED = "ratchet_support_route"
LOGPROB_TOLERANCE = 1e-3
"""Nats, for one option. The same engine in the same dtype differs only by what else was in the batch."""
ITEMS_TOLERANCE = 0.02
"""Share of items, at least one, whose outcome may differ: two options within the tolerance of one another."""


@dataclass(frozen=True)
class Comparison:
    task: str
    n: int
    lm_eval: float
    ratchet: float
    items_that_differ: int
    """Right by one count and wrong by the other; of generated text: other text."""
    worst_logprob_difference: float | None
    """Nats; None for generated text."""

    @property
    def agrees(self) -> bool:
        allowed = max(1, round(self.n * ITEMS_TOLERANCE))
        worst = self.worst_logprob_difference
        return self.items_that_differ <= allowed and (worst is None or worst <= LOGPROB_TOLERANCE)


class GatewayModel:
    """A version behind the gateway as `evaluation.suites` asks it; remembers what options scored."""

    concurrency = 1

    def __init__(self, client: EngineClient, model: str) -> None:
        self._client = client
        self._model = model
        self.scored: dict[tuple[str, str], Likelihood] = {}

    def chat(self, messages: Sequence[Message], max_tokens: int) -> str:
        return self._client.chat(self._model, messages, max_tokens)

    def loglikelihood(self, prefix: str, continuations: Sequence[str]) -> Sequence[Likelihood]:
        found = self._client.loglikelihood(self._model, prefix, continuations)
        self.scored.update({(prefix, text): one for text, one in zip(continuations, found, strict=True)})
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.lm_eval_check")
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True, help="assistant, assistant@alias or assistant@v0")
    parser.add_argument("--tokenizer", required=True, help="the base model's folder")
    parser.add_argument("--tasks", nargs="+", default=["ratchet_commonsense", "ratchet_last_word", GENERATED])
    parser.add_argument("--task-dir", type=Path, default=TASKS)
    parser.add_argument("--suite", type=Path, help="folder of the benchmarks; default: the built-in suite")
    parser.add_argument("--limit", type=int, help="first items of each task")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    found = [
        compare(
            task,
            url=options.url,
            model=options.model,
            tokenizer=options.tokenizer,
            task_dir=options.task_dir,
            suite=options.suite,
            limit=options.limit,
        )
        for task in options.tasks
    ]
    told = json.dumps([{**asdict(one), "agrees": one.agrees} for one in found], indent=2)
    print(told)
    if options.out is not None:
        options.out.write_text(told + "\n")
    return 0 if all(one.agrees for one in found) else 1


def compare(
    task: str,
    *,
    url: str,
    model: str,
    tokenizer: str,
    task_dir: Path = TASKS,
    suite: Path | None = None,
    limit: int | None = None,
) -> Comparison:
    with EngineClient(url) as client:
        asked = GatewayModel(client, model)
        if task == GENERATED:
            return _compare_generated(asked, url, model, tokenizer, task_dir, limit)
        name, metric = SCORED[task]
        [benchmark] = load_general(suite, [name])
        benchmark = Benchmark(name, benchmark.questions[:limit])
        ours, _ = measure_general(asked, [benchmark], {})
    score, samples = run_lm_eval(
        task,
        kind="local-completions",
        url=f"{url}/v1/completions",
        model=model,
        tokenizer=tokenizer,
        task_dir=task_dir,
        limit=limit,
        metric=metric,
    )
    differ = sum(sample[metric] != item.score for sample, item in zip(samples, ours.items, strict=True))
    pairs = [
        (theirs, asked.scored[option.prefix, option.text].logprob)
        for sample, question in zip(samples, benchmark.questions, strict=True)
        for (theirs, _), option in zip(sample["filtered_resps"], question.options, strict=True)
    ]
    worst = max(abs(theirs - mine) for theirs, mine in pairs)
    return Comparison(task, ours.n, score, ours.score, differ, worst)


def _compare_generated(
    asked: GatewayModel, url: str, model: str, tokenizer: str, task_dir: Path, limit: int | None
) -> Comparison:
    rows = (EXAMPLES / "support_route.heldout.jsonl").read_text().splitlines()[:limit]
    items = [
        SkillItem(str(number), DemonstrationLine.model_validate_json(row).to_demonstration())
        for number, row in enumerate(rows)
    ]
    ours = measure_skill(asked, "support_route", ExactGrader(), items, {})
    assert ours is not None
    score, samples = run_lm_eval(
        GENERATED,
        kind="local-chat-completions",
        url=f"{url}/v1/chat/completions",
        model=model,
        tokenizer=tokenizer,
        task_dir=task_dir,
        limit=limit,
        metric="exact_match",
    )
    differ = sum(
        sample["filtered_resps"][0] != item.output for sample, item in zip(samples, ours.items, strict=True)
    )
    return Comparison(GENERATED, ours.n, score, ours.score, differ, None)


def run_lm_eval(
    task: str,
    *,
    kind: str,
    url: str,
    model: str,
    tokenizer: str,
    task_dir: Path,
    limit: int | None,
    metric: str,
) -> tuple[float, list[dict[str, Any]]]:
    """The task's score, and its samples in the order of the documents. Nothing is fetched."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    asked: dict[str, Any] = {"model": model, "base_url": url, "num_concurrent": 1, "max_retries": 1}
    chat = kind == "local-chat-completions"
    if not chat:
        asked |= {"tokenizer_backend": "huggingface", "tokenizer": tokenizer, "batch_size": 4}
    results = simple_evaluate(
        model=kind,
        model_args=asked,
        tasks=[task],
        task_manager=TaskManager(include_path=str(task_dir), include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
    )
    samples = sorted(results["samples"][task], key=lambda sample: int(sample["doc_id"]))
    return float(results["results"][task][f"{metric},none"]), samples


if __name__ == "__main__":
    sys.exit(main())
