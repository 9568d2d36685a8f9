"""From the options of `ratchet train` and `ratchet preflight` to a training job."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from artifacts import base_models
from artifacts.base_models import BUILT_IN, BaseModel
from cli.assistants import parse_grader, read_bytes
from cli.client import Json
from cli.errors import CliError
from cli.output import err
from cli.updates import parse_settings
from domain.data_checks import quoted
from domain.demonstration import Demonstration, Message, Split, is_held_out, parse_jsonl, parse_prompts
from domain.errors import DemonstrationsRejected, RatchetError
from domain.preflight import Finding, Place, PreflightReport
from domain.recipe import Recipe
from domain.rehearsal import general_prompts
from domain.settings import Settings
from domain.skill import Grader
from domain.training import SkillToTeach, TrainingJob

_GRADER: TypeAdapter[Grader] = TypeAdapter(Grader)
LINES_SHOWN = 20
Report = TypeVar("Report", bound=PreflightReport)


@dataclass(frozen=True)
class Options:
    """As given on the command line."""

    base: str
    demonstrations: Path
    method: str | None
    recipe: list[str]
    settings: list[str]
    grader: str
    holdout_fraction: float
    rehearsal: Path | None
    parent: Path | None
    rollout_url: str | None


@dataclass(frozen=True)
class Inputs:
    """What was read and checked: the job, but for its folders, and how its items are found in the file."""

    job: TrainingJob
    file: Path
    file_sha256: str
    lines: dict[Split, list[int]]
    """Line of each of the job's demonstrations, from 1."""
    repeated: list[tuple[int, int, Demonstration]]
    """Lines left out, each with the line whose content it repeats."""

    @property
    def skill(self) -> SkillToTeach:
        return self.job.skills[0]

    def with_lines(self, report: Report) -> Report:
        """The trainer's report, its places named by lines of the file, with the lines that were left out."""
        found = [
            finding.model_copy(update={"places": [self._with_line(place) for place in finding.places]})
            for finding in report.findings
        ]
        if self.repeated:
            found.append(self._left_out())
        return report.model_copy(update={"findings": found})

    def _with_line(self, place: Place) -> Place:
        if place.split == "rehearsal":
            return place
        lines = self.lines[place.split]
        like = None if place.like is None else lines[place.like - 1]
        return place.model_copy(update={"line": lines[place.number - 1], "like": like})

    def _left_out(self) -> Finding:
        return Finding(
            code="duplicate",
            severity="warning",
            message=f"{len(self.repeated)} lines repeat earlier ones and were left out.",
            why="A demonstration that is sent again counts once, as it does in the service.",
            mend="Nothing is lost; remove the lines to be rid of this warning.",
            param="demonstrations",
            places=[
                Place(
                    skill=self.skill.name,
                    split="train",
                    number=line,
                    line=line,
                    detail=f"repeats {quoted(repeated)}",
                    like=like,
                )
                for line, like, repeated in self.repeated
            ],
        )


def read_inputs(options: Options) -> Inputs:
    """Read, check and split everything that a training needs. Raises CliError naming the option, field or
    line that is wrong."""
    body = read_bytes(options.demonstrations)
    numbered = _parse(options.demonstrations, body)
    grader = _grader(options.grader)
    rehearsal = _rehearsal(options.rehearsal)
    parent = _parent(options.parent)
    base = _base(options.base)
    first_lines: dict[str, int] = {}
    lines: dict[Split, list[int]] = {"train": [], "holdout": []}
    kept: dict[Split, list[Demonstration]] = {"train": [], "holdout": []}
    repeated = []
    for line, demonstration in numbered:
        first = first_lines.setdefault(demonstration.content_hash(), line)
        if first != line:
            repeated.append((line, first, demonstration))
            continue
        held_out = is_held_out(demonstration.prompt_hash(), options.holdout_fraction)
        split: Split = "holdout" if held_out else "train"
        lines[split].append(line)
        kept[split].append(demonstration)
    if not kept["train"]:
        raise CliError(
            f"{options.demonstrations}: all {len(kept['holdout'])} demonstrations are held out: lower "
            "--holdout-fraction or add demonstrations"
        )
    skill = SkillToTeach(name=options.demonstrations.stem, grader=grader, **kept)
    job = TrainingJob(
        update_id=_run_id(parent),
        base_path=str(base.path),
        base_model=base.name,
        parent_adapter_path=None if parent is None else str(parent),
        recipe=_recipe(options, base),
        skills=[skill],
        rehearsal=rehearsal,
        rollout_url=_rollout_url(options.rollout_url),
        checkpoint_dir="",
        output_dir="",
    )
    sha256 = hashlib.sha256(body).hexdigest()
    return Inputs(job, options.demonstrations, sha256, lines, repeated)


def _parse(file: Path, body: bytes) -> list[tuple[int, Demonstration]]:
    try:
        return parse_jsonl(body)
    except DemonstrationsRejected as rejected:
        raise _bad_lines(file, rejected) from rejected


def _rehearsal(file: Path | None) -> list[list[Message]]:
    if file is None:
        return general_prompts()
    try:
        return parse_prompts(read_bytes(file))
    except DemonstrationsRejected as rejected:
        raise _bad_lines(file, rejected) from rejected


def _bad_lines(file: Path, rejected: DemonstrationsRejected) -> CliError:
    shown = [f"{file}: line {bad.line}: {bad.message}" for bad in rejected.lines[:LINES_SHOWN]]
    if len(rejected.lines) > LINES_SHOWN:
        shown.append(f"and {len(rejected.lines) - LINES_SHOWN} more")
    return CliError("\n".join(shown))


def _grader(text: str) -> Grader:
    try:
        return _GRADER.validate_python(parse_grader(text))
    except ValidationError as invalid:
        raise CliError(_fields(invalid, "--grader")) from invalid


def _recipe(options: Options, base: BaseModel) -> Recipe:
    """The base model's default recipe with what was given, in this order: file, --set, --method."""
    given: Json = parse_settings(options.recipe, "--recipe") | parse_settings(options.settings, "--set")
    if options.method is not None:
        given["method"] = options.method
    try:
        return Recipe.completed(given, base.parameter_count)
    except ValidationError as invalid:
        raise CliError(_fields(invalid, "recipe")) from invalid


def _fields(invalid: ValidationError, under: str) -> str:
    """Every bad field by its path and what is wrong with it."""
    found = []
    for error in invalid.errors():
        path = ".".join([under, *(str(part) for part in error["loc"])])
        found.append(f"{path}: {error['msg'].removeprefix('Value error, ')}")
    return "; ".join(found)


def _base(name: str) -> BaseModel:
    cache = Settings().cache_dir
    folder = Path(name).expanduser()
    if name not in BUILT_IN and folder.is_dir():
        name = str(folder.resolve())
    elif not folder.is_absolute() and not (cache / "base" / name.replace("/", "--")).exists():
        err.print(f"looking for base model {name}, which may have to be fetched")
    try:
        return base_models.resolve(name, cache)
    except RatchetError as error:
        raise CliError(error.message) from error


def _parent(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    if not any(folder.glob("*.safetensors")):
        raise CliError(f"--parent {folder} holds no trained model: no *.safetensors file is there")
    return folder.resolve()


def _rollout_url(url: str | None) -> str | None:
    if url is not None and not url.startswith(("http://", "https://")):
        raise CliError(f"--rollout-url {url!r} is not a URL like http://127.0.0.1:8000")
    return url or None


def _run_id(parent: Path | None) -> str:
    """Differs for different parents, so that checkpoints of a run on another parent are not resumed: paths
    are no part of a job's fingerprint."""
    if parent is None:
        return "train"
    digest = hashlib.sha256(str(parent).encode())
    for file in sorted(parent.glob("*.safetensors")):
        state = file.stat()
        digest.update(f"{file.name}:{state.st_size}:{state.st_mtime_ns}".encode())
    return f"train-{digest.hexdigest()[:16]}"
