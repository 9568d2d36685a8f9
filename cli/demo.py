"""`ratchet demo`: the main job end to end, on a real model, with a client that keeps chatting."""

import json
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from cli.background import BackgroundChat
from cli.client import Client, Json
from cli.components import ROOT
from cli.demo_report import Answer, Report
from cli.demo_rows import GRADER, SkillFile, read_skill_file
from cli.demo_stack import OwnStack
from cli.errors import CliError
from cli.output import err, out
from cli.progress import ProgressLine
from cli.updates import require_passed, update_wishes
from domain.demonstration import Demonstration
from domain.grading import grade

EXAMPLES = ROOT / "examples"
BASE_MODEL = "smollm2-135m-instruct"
EVAL_THREADS = 4
SERVED_SECONDS = 30.0
"""How long the earlier version may take to answer after a rollback."""
POLL_SECONDS = 0.2
PROBE_TOKENS = 32
START_SECONDS = 1800.0


def demo(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result there as JSON too.", show_default=False)
    ] = None,
    skill: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE.jsonl: teach this instead of the examples; in order.", show_default=False
        ),
    ] = None,
    evaluate: Annotated[
        list[str] | None,
        typer.Option("--eval", help="NAME=FILE.jsonl: measure it through the gateway.", show_default=False),
    ] = None,
    home: Annotated[
        Path | None, typer.Option(help="Home of the demo's stack; default: temporary.", show_default=False)
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Use this running stack instead of an own one.", show_default=False)
    ] = None,
    base_model: Annotated[str, typer.Option(help="Base model of the demo's assistant.")] = BASE_MODEL,
    recipe: Annotated[list[str] | None, typer.Option(help="As for `ratchet update`.")] = None,
    gate: Annotated[list[str] | None, typer.Option(help="As for `ratchet update`.")] = None,
) -> None:
    """Teach two skills one after the other, measure, chat all the while, roll back."""
    skills, evals = choose_files(skill, evaluate)
    wishes = update_wishes(recipe, gate)
    report = Report(skills=[chosen.name for chosen in skills])
    started = time.monotonic()
    failure: CliError | None = None
    try:
        with nullcontext() if url else OwnStack(home) as stack:
            err.print(f"stack at {url or (stack.url if stack else '')}")
            with Client(url or (stack.url if stack else "")) as client:
                Demo(client, report, evals, wishes).run(skills, base_model)
    except CliError as error:
        failure = error
        report.error = str(error)
    report.wall_seconds = time.monotonic() - started
    report.print_to(out)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_json(), ensure_ascii=False, indent=2) + "\n")
    if failure is not None:
        raise failure
    if report.failures:
        raise CliError(f"{len(report.failures)} background requests failed, first: {report.failures[0]}")


class Demo:
    """One run against one API; fills the report as it goes."""

    def __init__(self, client: Client, report: Report, evals: list[SkillFile], wishes: Json) -> None:
        self._client = client
        self._wishes = wishes
        self._report = report
        self._evals = evals
        self._name = f"demo-{secrets.token_hex(3)}"
        self._path = f"/v1/assistants/{self._name}"

    def run(self, skills: list[SkillFile], base_model: str) -> None:
        """Raises CliError when an update makes no version that serves, or the rollback does not show."""
        client, report = self._client, self._report
        client.post("/v1/assistants", {"name": self._name, "base_model": base_model})
        report.assistant, report.url = self._name, client.url
        probes = self._probes(skills)
        self._await_serving()
        chat = BackgroundChat(client, self._name)
        try:
            with chat:
                self._observe("base", "v0", probes)
                for number, skill in enumerate(skills, start=1):
                    version = self._teach(skill, f"update {number}/{len(skills)} {skill.name}", number)
                    self._observe(f"after_{number}", version, probes)
                self._observe("after_rollback", self._roll_back(), probes)
        finally:
            report.note_chat(chat)

    def _await_serving(self) -> None:
        """A base model that is new to the stack gets an engine first, which may take minutes."""
        deadline = time.monotonic() + START_SECONDS
        while self._client.get(f"{self._path}/aliases/champion")["serving_version"] is None:
            if time.monotonic() > deadline:
                raise CliError(f"{self._name} is not served after {START_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)

    def _teach(self, skill: SkillFile, label: str, number: int) -> str:
        """The version that it made. Raises CliError unless that version serves."""
        client = self._client
        body: Json = {"name": skill.name, "description": skill.description}
        client.post(f"{self._path}/skills", body | {"grader": GRADER.dump_python(skill.grader, mode="json")})
        pushed = client.post_jsonl(f"{self._path}/skills/{skill.name}/demonstrations", skill.jsonl())
        err.print(f"{label}: {pushed['accepted']} demonstrations, {pushed['holdout']} of them held out")
        update = client.post(f"{self._path}/updates", self._wishes | {"skills": [skill.name]})
        progress = ProgressLine(label)
        progress.follow(client.follow(update["id"]))
        update = client.get(f"/v1/updates/{update['id']}")
        self._report.stage_seconds[f"update {number}"] = progress.stage_seconds
        self._report.matrix = client.get(f"{self._path}/matrix")
        require_passed(update)
        if progress.swap_seconds is None:
            raise CliError(f"{update['version']} passed its gate, but does not serve")
        self._report.swaps.append({"version": update["version"], "seconds": progress.swap_seconds})
        return str(update["version"])

    def _observe(self, moment: str, version: str, probes: list[tuple[str, Demonstration]]) -> None:
        """What the served assistant answers now, and its score on every file to measure.

        Raises CliError when another version than `version` answers.
        """
        report = self._report
        report.moments[moment] = version
        for name, item in probes:
            reply = self._client.chat(self._name, conversation(item), max_tokens=PROBE_TOKENS)
            require_version(reply.version, version)
            answer = Answer(name, item.messages[-1].content, item.response, moment, reply.version, reply.text)
            report.answers.append(answer)
        for chosen in self._evals:
            score = measure(self._client, self._name, chosen, version)
            report.evals.setdefault(chosen.name, {})[moment] = score
            report.eval_rows[chosen.name] = len(chosen.demonstrations)
            err.print(f"{moment.replace('_', ' ')}: {chosen.name} {score:.3f}")

    def _roll_back(self) -> str:
        """The version that answers again. Raises CliError when it does not."""
        started = time.monotonic()
        moved = self._client.post(f"{self._path}/rollback", {"reason": "end of the demo"})
        while True:
            messages = [{"role": "user", "content": "Hello"}]
            answered = self._client.chat(self._name, messages, max_tokens=1).version
            seconds = time.monotonic() - started
            if answered == moved["to_version"]:
                break
            if seconds > SERVED_SECONDS:
                raise CliError(f"{seconds:.0f} s after the rollback {answered} still answers")
            time.sleep(POLL_SECONDS)
        self._report.rollback = {
            "from_version": moved["from_version"],
            "to_version": moved["to_version"],
            "seconds": round(seconds, 3),
        }
        return str(moved["to_version"])

    def _probes(self, skills: list[SkillFile]) -> list[tuple[str, Demonstration]]:
        """One prompt of each skill, from its file to measure when there is one."""
        held_out = {chosen.name: chosen.demonstrations[0] for chosen in self._evals}
        return [(skill.name, held_out.get(skill.name, skill.demonstrations[-1])) for skill in skills]


def measure(client: Client, model: str, chosen: SkillFile, version: str) -> float:
    """Share of right answers by greedy decoding through the gateway.

    Raises CliError when another version than `version` answers.
    """

    def score(item: Demonstration) -> float:
        reply = client.chat(model, conversation(item), max_tokens=chosen.max_tokens)
        require_version(reply.version, version)
        return grade(chosen.grader, reply.text, item.answer)

    with ThreadPoolExecutor(EVAL_THREADS) as pool:
        scores = list(pool.map(score, chosen.demonstrations))
    return round(sum(scores) / len(scores), 4)


def require_version(answered: str | None, expected: str) -> None:
    if answered != expected:
        raise CliError(f"{answered} answered where {expected} should serve")


def conversation(item: Demonstration) -> list[Json]:
    return [message.model_dump() for message in item.messages]


Files = tuple[list[SkillFile], list[SkillFile]]
"""The skills to teach, and the files to measure."""


def choose_files(skill: list[str] | None, evaluate: list[str] | None) -> Files:
    """By default the examples and their held-out rows."""
    evals: list[SkillFile] = []
    if skill:
        skills = [read_skill_file(name, file) for name, file in map(name_and_file, skill)]
    else:
        skills, evals = read_examples(EXAMPLES)
    graders = {chosen.name: chosen.grader for chosen in skills}
    for name, file in map(name_and_file, evaluate or []):
        evals.append(read_skill_file(name, file, grader=graders.get(name)))
    return skills, evals


def read_examples(folder: Path) -> Files:
    """Raises CliError when the examples are not there."""
    index = folder / "skills.json"
    if not index.is_file():
        raise CliError(f"{index} is not there: run from the project's folder, or give --skill NAME=FILE")
    skills: list[SkillFile] = []
    evals: list[SkillFile] = []
    for entry in json.loads(index.read_text(encoding="utf-8")):
        grader = GRADER.validate_python(entry["grader"])
        for target, file in ((skills, entry["demonstrations"]), (evals, entry["held_out"])):
            target.append(
                read_skill_file(entry["name"], folder / file, grader=grader, description=entry["description"])
            )
    return skills, evals


def name_and_file(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals or not name or not file:
        raise CliError(f"'{text}' is not NAME=FILE.jsonl")
    return name, Path(file)
