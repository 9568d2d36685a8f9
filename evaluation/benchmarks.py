"""General benchmarks and ordinary prompts, read from JSONL files. The built-in ones lie in `general/`.

A file is one benchmark, named by what stands before its first dot; its rows carry a `doc_id` and are
  {"query", "choices", "gold"}                    a question (hellaswag, arc_easy, piqa, boolq, commonsense)
  {"context_options", "continuation", "gold"}     which context the ending fits (winogrande)
  {"context", "continuation"}                     the last word (lambada, last_word)
`ordinary.jsonl` is not a benchmark: {"prompt", "answers"}, plain answers that a person wrote.
Prompts and scoring follow lm-eval, so that its figures and ours can be held against each other.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domain.errors import InvalidInput

BUILT_IN = Path(__file__).parent / "general"
ORDINARY = "ordinary"
"""Suite of the leak check."""
LIKELIHOOD = "likelihood"
"""General suite whose items are all benchmarks' items, scored by the probability of the right option:
the same damage moves it long before it flips an answer, so it is what small suites are judged on."""


@dataclass(frozen=True)
class Option:
    """`text` scored after `prefix`."""

    prefix: str
    text: str


@dataclass(frozen=True)
class Question:
    """One right option among several; a single option is right when it is what the model says itself."""

    item: str
    shown: str
    """What a person reads as the prompt."""
    options: tuple[Option, ...]
    gold: int
    by_length: bool
    """Whether likelihoods are compared per byte of option, as lm-eval's acc_norm does."""


@dataclass(frozen=True)
class Benchmark:
    name: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class OrdinaryPrompt:
    item: str
    prompt: str
    answers: tuple[str, ...]


def load_general(folder: Path | None, names: Sequence[str] | None = None) -> list[Benchmark]:
    """Every benchmark of `folder` (None: the built-in suite), or those in `names`, in order of name.

    Raises InvalidInput naming the file and line when one can't be read, is empty, or is missing.
    """
    files = _files(folder or BUILT_IN)
    files.pop(ORDINARY, None)
    missing = sorted(set(names or ()) - files.keys())
    if missing or not files:
        raise InvalidInput(
            f"{folder or BUILT_IN} has no benchmark {', '.join(missing) or 'at all'}.",
            param="general_suite_dir",
        )
    return [
        Benchmark(name, tuple(_question(name, row, file, line) for line, row in _rows(file)))
        for name, file in sorted(files.items())
        if names is None or name in names
    ]


def load_ordinary(folder: Path | None) -> list[OrdinaryPrompt]:
    """`ordinary.jsonl` of `folder` where it has one, else the built-in prompts. Raises InvalidInput."""
    file = _files(folder or BUILT_IN).get(ORDINARY) or BUILT_IN / "ordinary.jsonl"
    prompts = []
    for line, row in _rows(file):
        try:
            answers = tuple(str(answer) for answer in row["answers"])
            prompts.append(OrdinaryPrompt(f"{ORDINARY}:{row['doc_id']}", str(row["prompt"]), answers))
        except (KeyError, TypeError) as error:
            raise _invalid(file, line, f"needs doc_id, prompt and answers ({error})") from error
    return prompts


def _files(folder: Path) -> dict[str, Path]:
    return {path.name.split(".")[0]: path for path in folder.glob("*.jsonl")}


def _rows(file: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file}: {error}", param="general_suite_dir") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _invalid(file, number, f"not JSON ({error})") from error
            if not isinstance(row, dict):
                raise _invalid(file, number, "not an object")
            rows.append((number, row))
    if not rows:
        raise InvalidInput(f"{file} is empty.", param="general_suite_dir")
    return rows


def _question(name: str, row: dict[str, Any], file: Path, line: int) -> Question:
    try:
        item = f"{name}:{row['doc_id']}"
        if "choices" in row:
            return _among_choices(item, str(row["query"]), [str(c) for c in row["choices"]], row["gold"])
        if "context_options" in row:
            # lm-eval's winogrande: the contexts compete, the ending is the same.
            ending = " " + str(row["continuation"])
            options = tuple(Option(str(prefix), ending) for prefix in row["context_options"])
            return Question(item, str(row["context_options"][0]), options, _gold(row["gold"], options), False)
        context, word = str(row["context"]), str(row["continuation"])
        return Question(item, context, (Option(context, " " + word),), 0, False)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _invalid(file, line, f"not a row of a known benchmark format ({error})") from error


def _among_choices(item: str, query: str, choices: list[str], gold: Any) -> Question:
    # lm-eval asks arc_easy, piqa and boolq with "Answer:" on a line of its own; hellaswag just goes on.
    prefix = query.rstrip()
    if "Question:" in prefix and not prefix.endswith("Answer:"):
        prefix += "\nAnswer:"
    options = tuple(Option(prefix, " " + choice) for choice in choices)
    yes_or_no = {choice.lower() for choice in choices} == {"yes", "no"}
    return Question(item, prefix, options, _gold(gold, options), by_length=not yes_or_no)


def _gold(gold: Any, options: Sequence[Option]) -> int:
    if not isinstance(gold, int) or not 0 <= gold < len(options) or len(options) < 2:
        raise ValueError(f"gold is {gold!r} of {len(options)} options")
    return gold


def _invalid(file: Path, line: int, what: str) -> InvalidInput:
    return InvalidInput(f"{file}, line {line}: {what}.", param="general_suite_dir")
