"""Measuring against a scripted model whose every likelihood is written down here."""

import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from domain.demonstration import Message
from domain.errors import EngineUnavailable, InvalidInput
from domain.measurement import ItemScore, Likelihood
from domain.skill import ExactGrader, RegexGrader
from evaluation.benchmarks import BUILT_IN, load_general, load_ordinary
from evaluation.leak import TaughtSkill, format_of, leaks_into
from evaluation.suites import (
    measure_general,
    measure_ordinary,
    measure_skill,
    reasoning_tokens,
    skill_items,
)


class Scripted:
    """Answers from a table; -1 per byte for what is not in it. Remembers what it was asked."""

    concurrency = 3

    def __init__(
        self,
        say: Callable[[str], str] = str.upper,
        likelihoods: dict[tuple[str, str], Likelihood] | None = None,
    ) -> None:
        self.say = say
        self.likelihoods = likelihoods or {}
        self.asked: list[str] = []
        self.lock = threading.Lock()

    def chat(self, messages: Sequence[Message], max_tokens: int) -> str:
        with self.lock:
            self.asked.append(messages[-1].content)
        return self.say(messages[-1].content)

    def loglikelihood(self, prefix: str, continuations: Sequence[str]) -> list[Likelihood]:
        with self.lock:
            self.asked.append(prefix)
        return [
            self.likelihoods.get((prefix, text), Likelihood(-float(len(text.encode())), False))
            for text in continuations
        ]


@dataclass
class Row:
    id: str
    body: dict[str, Any]


def row(number: int, prompt: str, answer: str) -> Row:
    return Row(
        f"demo_{number}",
        {"messages": [{"role": "user", "content": prompt}], "response": answer, "answer": answer},
    )


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in rows))


def test_a_skill_is_asked_once_per_item_and_graded() -> None:
    model = Scripted()
    items = skill_items([row(1, "a", "A"), row(2, "b", "A"), row(3, "c", "C"), row(4, "d", "D")])
    measured = measure_skill(model, "shout", ExactGrader(), items, {})
    assert measured is not None
    assert (measured.kind, measured.suite, measured.n, measured.score) == ("skill", "shout", 4, 0.75)
    assert (measured.low, measured.high) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert [item.score for item in measured.items] == [1.0, 0.0, 1.0, 1.0]
    assert measured.items[1].output == "B"
    assert measured.items[1].expected == "A"
    assert sorted(model.asked) == ["a", "b", "c", "d"]


def test_known_items_are_not_asked_again_but_graded_again() -> None:
    model = Scripted()
    items = skill_items([row(1, "a", "yes"), row(2, "b", "B")])
    known = {"demo_1": ItemScore(item="demo_1", prompt="a", output="YES", expected="yes", score=0.0)}
    measured = measure_skill(model, "s", ExactGrader(ignore_case=True), items, known)
    assert measured is not None
    assert model.asked == ["b"]
    assert measured.score == 1.0


def test_a_skill_without_items_is_unmeasured() -> None:
    assert measure_skill(Scripted(), "s", ExactGrader(), [], {}) is None


def test_room_for_the_answer_is_the_responses_size() -> None:
    [short, long] = skill_items([row(1, "a", "A"), row(2, "b", "é" * 300)])
    assert short.max_tokens == 32
    assert long.max_tokens == 600


@pytest.mark.parametrize(
    ("template", "file", "window", "room"),
    [
        ("{{ messages }}", "chat_template.jinja", 32768, 0),
        ("{{ '<think>' }}{{ m.split('</think>') }}", "chat_template.jinja", 32768, 4096),
        ("</think>", "tokenizer_config.json", 32768, 4096),
        ("{{ '<think>' }}", "chat_template.jinja", 32768, 4096),
        ("</think>", "chat_template.jinja", 2048, 1024),
    ],
)
def test_a_model_that_reasons_has_room_for_it_before_its_answer(
    tmp_path: Path, template: str, file: str, window: int, room: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": window}))
    (tmp_path / file).write_text(template)
    assert reasoning_tokens(tmp_path) == room
    [item] = skill_items([row(1, "a", "A")], room)
    assert item.max_tokens == room + 32


def test_an_error_ends_the_measuring() -> None:
    class Broken(Scripted):
        def chat(self, messages: Sequence[Message], max_tokens: int) -> str:
            super().chat(messages, max_tokens)
            raise EngineUnavailable("gone")

    model = Broken()
    with pytest.raises(EngineUnavailable):
        measure_skill(model, "s", ExactGrader(), skill_items([row(n, str(n), "x") for n in range(500)]), {})
    assert len(model.asked) <= model.concurrency


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(
        tmp_path,
        "piqa.dev.jsonl",
        {"doc_id": 5, "query": "Question: dry hands\n", "choices": ["towel", "wet sponge"], "gold": 0},
        {"doc_id": 9, "query": "Question: boil it\n", "choices": ["pan", "hat"], "gold": 1},
    )
    write(tmp_path, "hellaswag.dev.jsonl", {"doc_id": 1, "query": "A man", "choices": ["x", "y"], "gold": 1})
    write(
        tmp_path,
        "winogrande.dev.jsonl",
        {"doc_id": 2, "context_options": ["the cup", "the jug"], "continuation": "fell.", "gold": 1},
    )
    write(tmp_path, "lambada.jsonl", {"doc_id": 7, "context": "he saw", "continuation": "Kim"})
    return tmp_path


def test_benchmarks_are_scored_as_lm_eval_does(folder: Path) -> None:
    dry = "Question: dry hands\nAnswer:"
    model = Scripted(
        likelihoods={
            # In all the sponge is less likely; per byte (-8/5 against -10/10) it is the likelier.
            (dry, " towel"): Likelihood(-8.0, False),
            (dry, " wet sponge"): Likelihood(-10.0, False),
            ("Question: boil it\nAnswer:", " pan"): Likelihood(-6.0, False),
            ("Question: boil it\nAnswer:", " hat"): Likelihood(-3.0, False),
            ("A man", " x"): Likelihood(-1.0, False),
            ("A man", " y"): Likelihood(-1.0 - math.log(3), False),
            ("the cup", " fell."): Likelihood(-5.0, False),
            ("the jug", " fell."): Likelihood(-4.0, False),
            ("he saw", " Kim"): Likelihood(math.log(0.25), True),
        }
    )
    found = {m.suite: m for m in measure_general(model, load_general(folder), {})}
    assert {suite: m.score for suite, m in found.items() if suite != "likelihood"} == {
        "hellaswag": 0.0,
        "lambada": 1.0,
        "piqa": 0.5,
        "winogrande": 1.0,
    }
    assert found["piqa"].items[0].output == "wet sponge"
    assert found["piqa"].items[0].expected == "towel"
    assert found["winogrande"].items[0].expected == "the jug fell."
    probability = {item.item: item.score for item in found["likelihood"].items}
    assert probability["hellaswag:1"] == pytest.approx(0.25)
    assert probability["lambada:7"] == pytest.approx(0.25)
    assert probability["winogrande:2"] == pytest.approx(1 / (1 + math.exp(-1)))
    # -8/5 and -10/10 per byte, times the mean length 7.5: -12 and -7.5.
    assert probability["piqa:5"] == pytest.approx(1 / (1 + math.exp(12 - 7.5)))


def test_general_items_known_in_full_are_not_asked_again(folder: Path) -> None:
    first = measure_general(Scripted(), load_general(folder), {})
    known = {m.suite: {item.item: item for item in m.items} for m in first}
    again = Scripted()
    assert measure_general(again, load_general(folder), known) == first
    assert again.asked == []
    del known["likelihood"]["piqa:9"]
    measure_general(again, load_general(folder), known)
    assert again.asked == ["Question: boil it\nAnswer:"]


def test_chosen_benchmarks_only(folder: Path) -> None:
    assert [b.name for b in load_general(folder, ["piqa", "lambada"])] == ["lambada", "piqa"]
    with pytest.raises(InvalidInput, match="no benchmark boolq"):
        load_general(folder, ["boolq"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"doc_id": 1, "prompt": "Write a resume"}', "line 1: not a row of a known benchmark"),
        ('{"doc_id": 1, "query": "q", "choices": ["a", "b"], "gold": 2}', "gold is 2 of 2"),
        ("", "is empty"),
    ],
)
def test_a_bad_benchmark_file_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "odd.jsonl").write_text(line)
    with pytest.raises(InvalidInput, match=message):
        load_general(tmp_path)


def test_an_empty_folder_is_no_suite(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no benchmark"):
        load_general(tmp_path)


def test_the_built_in_suite_is_whole() -> None:
    suites = {benchmark.name: benchmark for benchmark in load_general(None)}
    assert set(suites) == {"commonsense", "last_word"}
    assert len(suites["commonsense"].questions) >= 60
    assert len(suites["last_word"].questions) >= 40
    for question in suites["commonsense"].questions:
        assert len({option.text for option in question.options}) == 4
    gold = [question.gold for question in suites["commonsense"].questions]
    assert all(gold.count(position) >= 10 for position in range(4))
    items = [question.item for suite in suites.values() for question in suite.questions]
    assert len(items) == len(set(items))
    assert len(load_ordinary(None)) >= 24


INTENT = TaughtSkill("intent", RegexGrader(pattern=r"INTENT: ([A-Z_]+)"), ["INTENT: A_B", "INTENT: C"])


def test_leaks_are_counted_and_named() -> None:
    prompts = load_ordinary(None)

    def say(prompt: str) -> str:
        return "INTENT: CAPITAL_ITALY" if "Italy" in prompt else "I would say so."

    measured = measure_ordinary(Scripted(say), prompts, [INTENT], {})
    assert (measured.kind, measured.suite, measured.n) == ("general", "ordinary", len(prompts))
    leaking = [item for item in measured.items if item.score == 0.0]
    assert [item.expected for item in leaking] == ["not in the format of 'intent'"]
    assert measured.score == pytest.approx(1 - 1 / len(prompts))


def test_known_ordinary_outputs_are_judged_by_the_skills_of_today() -> None:
    prompts = load_ordinary(None)
    first = measure_ordinary(Scripted(lambda _: "INTENT: X"), prompts, [], {})
    assert first.score == 1.0
    model = Scripted()
    again = measure_ordinary(model, prompts, [INTENT], {item.item: item for item in first.items})
    assert model.asked == []
    assert again.score == 0.0


def test_no_answer_that_a_person_wrote_counts_as_a_leak() -> None:
    prompts = load_ordinary(None)
    answers = [answer for prompt in prompts for answer in prompt.answers]
    shared = BUILT_IN.parents[2] / "shared" / "data" / "skills"
    skills = [INTENT, TaughtSkill("yes", ExactGrader(), ["Yes", "No"])]
    for file in sorted(shared.glob("*.train.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        skills.append(TaughtSkill(file.stem, ExactGrader(), [entry["demonstration"] for entry in rows]))
    formats = [format_of(skill, answers) for skill in skills]
    assert [answer for answer in answers if leaks_into(answer, formats)] == []
