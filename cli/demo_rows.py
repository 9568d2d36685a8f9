"""Files of the demo: DESIGN's demonstration lines, or rows of a benchmark with their own graders."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from cli.client import Json
from cli.errors import CliError
from domain.demonstration import Demonstration, DemonstrationLine
from domain.skill import ExactGrader, Grader

GRADER: TypeAdapter[Grader] = TypeAdapter(Grader)
BENCHMARK_FIELDS = frozenset({"prompt", "demonstration", "answer", "grader"})
"""A row that has these is a benchmark's; any other must be a demonstration line."""
CONTAINS_TOKENS = 64
"""Room for an answer in which the expected text may stand anywhere."""


@dataclass(frozen=True)
class SkillFile:
    """The demonstrations of one file and the one grader that fits them all."""

    name: str
    description: str
    grader: Grader
    demonstrations: list[Demonstration]

    def jsonl(self) -> bytes:
        """As the API takes them."""
        lines = [
            {
                "messages": [message.model_dump() for message in demonstration.messages],
                "response": demonstration.response,
                "answer": demonstration.answer,
                **({"context": demonstration.context} if demonstration.context else {}),
            }
            for demonstration in self.demonstrations
        ]
        return "\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()

    @property
    def max_tokens(self) -> int:
        """Enough for every right answer: a byte-level token has at least one byte."""
        if self.grader.type == "contains":
            return CONTAINS_TOKENS
        return max(len(demonstration.answer.encode()) for demonstration in self.demonstrations) + 8


def read_skill_file(
    name: str, file: Path, *, grader: Grader | None = None, description: str = ""
) -> SkillFile:
    """Raises CliError naming the file and the line when it cannot be taught from.

    `grader` is for demonstration lines; benchmark rows bring theirs. Default: exact.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{file} cannot be read: {error}") from error
    demonstrations, graders = [], set[str]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            demonstration, own = read_row(row)
        except (json.JSONDecodeError, ValidationError, ValueError) as error:
            raise CliError(f"{file} line {number}: {first_line(error)}") from error
        demonstrations.append(demonstration)
        if own is not None:
            graders.add(own.model_dump_json())
    if not demonstrations:
        raise CliError(f"{file} has no rows")
    if len(graders) > 1:
        raise CliError(f"{file}: its rows have {len(graders)} different graders, a skill has one")
    found = GRADER.validate_json(graders.pop()) if graders else grader or ExactGrader()
    return SkillFile(name, description, found, demonstrations)


def read_row(row: Json) -> tuple[Demonstration, Grader | None]:
    """A demonstration, and the row's own grader when it is a benchmark's row.

    Raises ValueError or ValidationError.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if not row.keys() >= BENCHMARK_FIELDS:
        return DemonstrationLine.model_validate(row).to_demonstration(), None
    line = DemonstrationLine(prompt=row["prompt"], response=row["demonstration"], answer=row["answer"])
    grader, answer = map_grader(row["grader"], row["answer"])
    return line.model_copy(update={"answer": answer}).to_demonstration(), grader


def map_grader(grader: Json, answer: str) -> tuple[Grader, str]:
    """A benchmark row's grader in Ratchet's words, and the answer that it compares with.

    Raises ValueError for a type that no grader of Ratchet's stands for.
    """
    kind = grader.get("type")
    if kind == "regex_exact":
        return GRADER.validate_python({"type": "regex", "pattern": grader["pattern"]}), answer
    if kind == "call_exact":
        return GRADER.validate_python({"type": "function_call"}), answer
    if kind == "contains_ci":
        return GRADER.validate_python({"type": "contains"}), str(grader["gold"])
    if kind == "sql_norm_exact":  # stricter than the benchmark's own: white space must agree too
        return ExactGrader(ignore_case=True), answer
    if kind == "exact":
        return ExactGrader(), answer
    raise ValueError(f"grader type {kind!r} has no counterpart here")


def first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        told = error.errors()[0]
        field = ".".join(str(part) for part in told["loc"])
        message = told["msg"].removeprefix("Value error, ")
        return f"{field}: {message}" if field else message
    return str(error)
