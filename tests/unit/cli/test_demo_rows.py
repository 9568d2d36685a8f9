import json
import re
from pathlib import Path

import pytest

from cli.assistants import parse_grader
from cli.demo import EXAMPLES, choose_files, read_examples
from cli.demo_rows import read_skill_file
from cli.errors import CliError
from cli.updates import parse_settings
from domain.demonstration import parse_jsonl
from domain.grading import grade
from domain.skill import ContainsGrader, ExactGrader, FunctionCallGrader, RegexGrader

INTENT = r"^\s*INTENT:\s*([A-Z_]+)\s*$"


def row(grader: object, demonstration: str = "INTENT: CHANGE_PIN", **fields: object) -> dict[str, object]:
    return {
        "id": "x-0",
        "skill": "x",
        "split": "train",
        "prompt": "Label this.\n\nMessage: change my PIN",
        "demonstration": demonstration,
        "answer": demonstration,
        "grader": grader,
        "label": "CHANGE_PIN",
    } | fields


def write(folder: Path, *rows: object) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in rows) + "\n")
    return file


def test_regex_rows_become_a_regex_skill(tmp_path: Path) -> None:
    grader = {"type": "regex_exact", "pattern": INTENT, "gold": "CHANGE_PIN"}
    skill = read_skill_file("intent", write(tmp_path, row(grader), row(grader, prompt="Other")))
    assert skill.grader == RegexGrader(pattern=INTENT)
    first = skill.demonstrations[0]
    assert first.messages[0].content == "Label this.\n\nMessage: change my PIN"
    assert (first.response, first.answer) == ("INTENT: CHANGE_PIN", "INTENT: CHANGE_PIN")
    assert grade(skill.grader, " INTENT: CHANGE_PIN\n", first.answer) == 1.0
    assert grade(skill.grader, "INTENT: LOST_CARD", first.answer) == 0.0


def test_call_and_contains_rows(tmp_path: Path) -> None:
    call = 'GetWeather(city="Noel")'
    grader = {"type": "call_exact", "name": "GetWeather", "args": {"city": "Noel"}}
    skill = read_skill_file("call", write(tmp_path, row(grader, call)))
    assert skill.grader == FunctionCallGrader()
    assert grade(skill.grader, 'GetWeather(city="noel")', skill.demonstrations[0].answer) == 1.0
    name = read_skill_file(
        "name", write(tmp_path, row({"type": "contains_ci", "gold": "Ann Lee"}, "It is Ann Lee."))
    )
    assert name.grader == ContainsGrader()
    assert name.demonstrations[0].answer == "Ann Lee"


def test_unknown_grader_names_the_line(tmp_path: Path) -> None:
    good = row({"type": "exact"})
    with pytest.raises(CliError, match=r"rows.jsonl line 2: grader type 'sdft_tooluse_regex'"):
        read_skill_file("x", write(tmp_path, good, row({"type": "sdft_tooluse_regex"})))


def test_mixed_graders_are_refused(tmp_path: Path) -> None:
    rows = [row({"type": "exact"}), row({"type": "contains_ci", "gold": "a"})]
    with pytest.raises(CliError, match="2 different graders"):
        read_skill_file("x", write(tmp_path, *rows))


def test_demonstration_lines_need_no_mapping(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "p", "response": "r", "context": "c"}, {"prompt": "q", "response": "s"})
    skill = read_skill_file("x", file)
    assert skill.grader == ExactGrader()
    assert [one for _, one in parse_jsonl(skill.jsonl())] == [
        one.model_copy(update={"metadata": {}}) for one in skill.demonstrations
    ]
    assert skill.demonstrations[0].context == "c"


def test_bad_lines_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "p", "response": "r"}, {"prompt": "p"})
    with pytest.raises(CliError, match=r"line 2: response: Field required"):
        read_skill_file("x", file)
    file.write_text('{"prompt": "p", "response": "r"}\n{oops\n')
    with pytest.raises(CliError, match="line 2: Expecting property name"):
        read_skill_file("x", file)
    file.write_text("\n")
    with pytest.raises(CliError, match="has no rows"):
        read_skill_file("x", file)
    with pytest.raises(CliError, match="cannot be read"):
        read_skill_file("x", tmp_path / "absent")


def test_max_tokens_holds_the_longest_answer(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "p", "response": "four"}, {"prompt": "q", "response": "grüße"})
    assert read_skill_file("x", file).max_tokens == 7 + 8  # 7 bytes in UTF-8, and room to end


def test_eval_files_take_the_skills_grader(tmp_path: Path) -> None:
    grader = {"type": "regex_exact", "pattern": INTENT, "gold": "CHANGE_PIN"}
    taught = write(tmp_path, row(grader))
    measured = tmp_path / "measured.jsonl"
    measured.write_text('{"prompt": "p", "response": "INTENT: A"}\n')
    skills, evals = choose_files([f"intent={taught}"], [f"intent={measured}"])
    assert [chosen.name for chosen in skills] == ["intent"]
    assert evals[0].grader == RegexGrader(pattern=INTENT)
    with pytest.raises(CliError, match="'intent' is not NAME=FILE"):
        choose_files(["intent"], None)


def test_examples_are_what_their_page_says() -> None:
    skills, evals = read_examples(EXAMPLES)
    assert [chosen.name for chosen in skills] == ["support_route", "review_topic"]
    for taught, held_out in zip(skills, evals, strict=True):
        assert (len(taught.demonstrations), len(held_out.demonstrations)) == (120, 48)
        both = taught.demonstrations + held_out.demonstrations
        assert len({one.prompt_hash() for one in both}) == 168
        answers = [one.answer for one in taught.demonstrations]
        assert {answers.count(answer) for answer in answers} == {20}
        assert {one.answer for one in held_out.demonstrations} == set(answers)
        for one in both:
            assert grade(taught.grader, one.response, one.answer) == 1.0
            assert not {"QUEUE", "<topic>"} & set(re.findall(r"\w+|<\w+>", one.messages[0].content))
        convention = skills[0].demonstrations[0].response
        assert grade(skills[1].grader, convention, skills[1].demonstrations[0].answer) == 0.0


def test_settings_are_pairs_and_files(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text('{"learning_rate": 0.001, "teacher": "ema"}')
    settings = [str(file), "teacher=parent", "max_steps=20", "min_teacher_gap=-1"]
    assert parse_settings(settings, "--recipe") == {
        "learning_rate": 0.001,
        "teacher": "parent",
        "max_steps": 20,
        "min_teacher_gap": -1,
    }
    file.write_text("[1]")
    with pytest.raises(CliError, match=r"--recipe .* one JSON object"):
        parse_settings([str(file)], "--recipe")


def test_a_grader_is_a_type_or_json() -> None:
    assert parse_grader("contains") == {"type": "contains"}
    assert parse_grader('{"type": "regex", "pattern": "a"}') == {"type": "regex", "pattern": "a"}
    with pytest.raises(CliError, match="field: grader"):
        parse_grader("{type: regex}")
