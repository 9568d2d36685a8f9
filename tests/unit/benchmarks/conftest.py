"""The trainer's tiny model, and shared-data files that it can read."""

import json
import os
from pathlib import Path

import pytest

from tests.unit.trainer.conftest import base_folder, exact, tokenizer  # noqa: F401

SHARED = Path(__file__).parents[3].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{SHARED} is missing, and CI must have it")
        pytest.skip(f"no shared data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two skills, `sort` (regex) and `call`, and the four benchmarks, in the shared formats."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "skills").mkdir(parents=True)
    (folder / "prior").mkdir()
    graders = {
        "sort": {"type": "regex_exact", "pattern": r"^\s*L:([A-Z]+)\s*$"},
        "call": {"type": "call_exact"},
    }
    answers = {"sort": ("L:A", "L:B"), "call": ('F(x="1")', 'G(x="2")')}
    for skill, grader in graders.items():
        for split, count in (("train", 6), ("dev", 34), ("eval", 6)):
            write(
                folder / "skills" / f"{skill}.{split}.jsonl",
                [
                    {
                        "id": f"{skill}-{split}-{number}",
                        "prompt": f"{skill} {split} {number}",
                        "demonstration": answers[skill][number % 2],
                        "answer": answers[skill][number % 2],
                        "grader": grader,
                        "label": "AB"[number % 2],
                    }
                    for number in range(count)
                ],
            )
    questions = [{"doc_id": n, "query": f"q{n} is", "choices": ["a", "bc"], "gold": n % 2} for n in range(5)]
    for name in ("hellaswag", "arc_easy", "piqa"):
        write(folder / "prior" / f"{name}.dev.jsonl", questions)
    words = [{"doc_id": n, "context": f"the word {n} is", "continuation": "it"} for n in range(5)]
    write(folder / "prior" / "lambada_openai.dev.jsonl", words)
    return folder


def write(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
