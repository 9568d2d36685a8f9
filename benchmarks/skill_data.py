"""The shared skills as the trainer and the graders take them: `skills/NAME.{train,dev,eval}.jsonl`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from domain.demonstration import Demonstration, Message
from domain.skill import ContainsGrader, FunctionCallGrader, Grader, RegexGrader
from domain.training import SkillToTeach
from evaluation.suites import SkillItem

HOLDOUT = 32
"""Dev rows that the trainer gets as held-out items; the rest of the dev split chooses between recipes."""

Row = TypeVar("Row")


@dataclass(frozen=True)
class StudiedSkill:
    """One skill and the items that it is measured on; `dev` shares no row with `teach.holdout`."""

    teach: SkillToTeach
    dev: list[SkillItem]
    evaluation: list[SkillItem]
    clusters: dict[str, str]
    """Item -> what it must be resampled with: the person for fictional_facts, else itself."""

    @property
    def name(self) -> str:
        return self.teach.name


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def evenly_spaced(values: Sequence[Row], count: int) -> list[Row]:
    """`count` of `values` at equal distances, or all when there are no more; the first is always there."""
    if count >= len(values):
        return list(values)
    return [values[index * len(values) // count] for index in range(count)]


def load_skill(data: Path, name: str, eval_rows: int) -> StudiedSkill:
    """The skill with `eval_rows` evenly spaced rows of its eval split.

    Raises ValueError naming the file when its rows have a grader that the product does not have.
    """
    files = {split: data / "skills" / f"{name}.{split}.jsonl" for split in ("train", "dev", "eval")}
    train, dev, evaluation = (rows(file) for file in files.values())
    chosen = evenly_spaced(evaluation, eval_rows)
    return StudiedSkill(
        teach=SkillToTeach(
            name=name,
            grader=_grader(train[0]["grader"], files["train"]),
            train=[_demonstration(row) for row in train],
            holdout=[_demonstration(row) for row in dev[:HOLDOUT]],
        ),
        dev=[SkillItem(row["id"], _demonstration(row)) for row in dev[HOLDOUT:]],
        evaluation=[SkillItem(row["id"], _demonstration(row)) for row in chosen],
        clusters={
            row["id"]: row["label"] if row["grader"]["type"] == "contains_ci" else row["id"]
            for row in evaluation
        },
    )


def _demonstration(row: dict[str, Any]) -> Demonstration:
    return Demonstration(
        messages=[Message(role="user", content=row["prompt"])],
        response=row["demonstration"],
        answer=row["answer"],
    )


def _grader(declared: dict[str, Any], file: Path) -> Grader:
    match declared["type"]:
        case "regex_exact":
            return RegexGrader(pattern=declared["pattern"])
        case "call_exact":
            return FunctionCallGrader()
        case "contains_ci":
            return ContainsGrader(ignore_case=True)
        case other:
            raise ValueError(f"{file}: no grader for {other!r}")
