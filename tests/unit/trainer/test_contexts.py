"""What the teacher is shown, message by message."""

from transformers import PreTrainedTokenizerFast

from domain.demonstration import Demonstration, Message
from domain.recipe import Recipe
from domain.training import SkillToTeach
from tests.unit.trainer.builders import demonstration
from trainer.contexts import build_lesson, chat_tokens, choose_others, teacher_messages


def shown(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


def test_turns_show_others_then_the_own_answer_then_ask_again() -> None:
    own = demonstration("q", "a", context="article")
    found = teacher_messages(own, [demonstration("q1", "a1")], "turns")
    assert shown(found) == [
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "article\n\nq"),
        ("assistant", "a"),
        ("user", "q"),
    ]


def test_instruction_uses_the_papers_words() -> None:
    found = teacher_messages(demonstration("q", "a"), [], "instruction")
    assert shown(found) == [
        (
            "user",
            "q\n\nThis is an example for a response to the question:\na\n\n"
            "Now answer with a response of your own, including the thinking process.",
        )
    ]


def test_system_message_stands_first_once() -> None:
    system = Message(role="system", content="be brief")
    own = Demonstration(messages=[system, Message(role="user", content="q")], response="a", answer="a")
    other = Demonstration(messages=[system, Message(role="user", content="q1")], response="a1", answer="a1")
    found = teacher_messages(own, [other], "turns")
    assert [m.role for m in found] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_others_exclude_the_own_prompt_vary_in_response_and_repeat() -> None:
    train = [demonstration(f"q{i}", "x" if i else "y") for i in range(20)]
    own = train[5]
    others = choose_others(own, train, 3, seed=4)
    assert len(others) == 3
    assert own not in others
    assert others[0].response != others[1].response
    assert others == choose_others(own, train, 3, seed=4)
    assert others != choose_others(own, train, 3, seed=5)


def test_fewer_candidates_than_asked_gives_all() -> None:
    train = [demonstration("q0", "a"), demonstration("q1", "b")]
    assert choose_others(train[0], train, 5, seed=0) == [train[1]]


def test_lesson_tokens(tokenizer: PreTrainedTokenizerFast, skill: SkillToTeach) -> None:
    recipe = Recipe(context="turns", num_context_demonstrations=0)
    lesson = build_lesson(tokenizer, skill, skill.train[0], recipe)
    assert tokenizer.decode(lesson.prompt) == "<s>user:item 0</s><s>assistant:"
    assert (
        tokenizer.decode(lesson.teacher_prompt)
        == "<s>user:item 0</s><s>assistant:AAA</s><s>user:item 0</s><s>assistant:"
    )
    assert tokenizer.decode(lesson.response) == "AAA</s>"
    assert chat_tokens(tokenizer, skill.train[0].messages) == lesson.prompt
