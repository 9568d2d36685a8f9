"""What the teacher is shown, message by message."""

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from domain.demonstration import Demonstration, Message
from domain.errors import TrainingRefused
from domain.recipe import Recipe
from domain.training import SkillToTeach
from tests.unit.trainer.builders import demonstration
from tests.unit.trainer.conftest import TEMPLATE, tiny_tokenizer
from trainer.contexts import build_lesson, build_text, chat_tokens, end_of_turn, teacher_messages
from trainer.neighbours import Neighbours


def shown(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


def sampled(train: list[Demonstration], count: int, seed: int) -> Neighbours:
    return Neighbours(train, Recipe(num_context_demonstrations=count, seed=seed))


def test_turns_show_others_then_the_own_answer_then_ask_again() -> None:
    own = demonstration("q", "a", context="article")
    found = teacher_messages(own, [demonstration("q1", "a1")], Recipe(context="turns"))
    assert shown(found) == [
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "article\n\nq"),
        ("assistant", "a"),
        ("user", "q"),
    ]


def test_instruction_uses_the_papers_words() -> None:
    found = teacher_messages(demonstration("q", "a"), [], Recipe())
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
    found = teacher_messages(own, [other], Recipe(context="turns"))
    assert [m.role for m in found] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_others_exclude_the_own_prompt_vary_in_response_and_repeat() -> None:
    train = [demonstration(f"q{i}", "x" if i else "y") for i in range(20)]
    own = train[5]
    others = sampled(train, 3, 4).of(own)
    assert len(others) == 3
    assert own not in others
    assert others[0].response != others[1].response
    assert others == sampled(train, 3, 4).of(own)
    assert others != sampled(train, 3, 5).of(own)


def test_fewer_candidates_than_asked_gives_all() -> None:
    train = [demonstration("q0", "a"), demonstration("q1", "b")]
    assert sampled(train, 5, 0).of(train[0]) == [train[1]]


def test_lesson_tokens(tokenizer: PreTrainedTokenizerFast, skill: SkillToTeach) -> None:
    recipe = Recipe(context="turns", num_context_demonstrations=0)
    lesson = build_lesson(tokenizer, skill.name, skill.train[0], [], recipe)
    assert tokenizer.decode(lesson.prompt) == "<s>user:item 0</s><s>assistant:"
    assert (
        tokenizer.decode(lesson.teacher_prompt)
        == "<s>user:item 0</s><s>assistant:AAA</s><s>user:item 0</s><s>assistant:"
    )
    assert tokenizer.decode(lesson.response) == "AAA</s>"
    assert chat_tokens(tokenizer, skill.train[0].messages) == lesson.prompt


def test_knowledge_shows_the_article_and_the_answer_to_the_teacher() -> None:
    own = demonstration("Who won?", "Ada", context="Ada won the cup.")
    assert shown(teacher_messages(own, [], Recipe(context="knowledge"))) == [
        (
            "user",
            "Ada won the cup.\n\nUse the text above to answer.\n\nWho won?\n\n"
            "This is a right answer:\nAda\n\n"
            "Now answer with a response of your own.",
        )
    ]


def test_feedback_shows_no_response() -> None:
    own = demonstration("Who won?", "Ada", context="Too long: one word.")
    ((_, text),) = shown(teacher_messages(own, [], Recipe(context="feedback")))
    assert "Too long: one word." in text
    assert "Ada" not in text


def test_a_template_is_filled_in_one_pass() -> None:
    """Braces inside a demonstration are not fields."""
    own = demonstration("set {response}", '{"a": 1}', context="{question}")
    recipe = Recipe(context="template", context_template="{context}|{question}|{response}|{other}")
    ((_, text),) = shown(teacher_messages(own, [], recipe))
    assert text == '{question}|set {response}|{"a": 1}|{other}'


@pytest.mark.parametrize("kind", ["knowledge", "feedback"])
def test_a_context_that_is_missing_is_named(kind: str) -> None:
    with pytest.raises(TrainingRefused, match="Who won") as refused:
        teacher_messages(demonstration("Who won?", "Ada"), [], Recipe.model_validate({"context": kind}))
    assert (refused.value.code, refused.value.param) == ("context_missing", "recipe.context")


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "come together"), ("{question} only", "must hold"), ("{response}", "must hold")],
)
def test_a_template_that_cannot_teach_is_refused(template: str | None, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe(context="template", context_template=template)


def test_nearest_are_the_likest_prompts_the_best_one_last() -> None:
    """'lost card' shares two words with the second prompt, one with the third, none with the others."""
    prompts = ["I lost my card", "a lost card, where", "where is my card", "good morning", "lost card"]
    train = [demonstration(prompt, "x") for prompt in prompts]
    recipe = Recipe(num_context_demonstrations=2, demonstration_selection="nearest")
    found = Neighbours(train[:4], recipe).of(train[4])
    assert {d.messages[0].content for d in found} == {"I lost my card", "a lost card, where"}
    alone = Neighbours([train[3], train[2]], recipe).of(train[4])
    assert [d.messages[0].content for d in alone] == ["good morning", "where is my card"]
    own = Neighbours(train, recipe).of(train[4])
    assert train[4] not in own


def test_a_prompt_without_words_has_neighbours_too() -> None:
    recipe = Recipe(num_context_demonstrations=2, demonstration_selection="nearest", context="turns")
    train = [demonstration(prompt, "A") for prompt in ("???", "one two", "two three")]
    assert len(Neighbours(train, recipe).of(train[0])) == 2
    [nearest] = Neighbours(train, recipe.model_copy(update={"num_context_demonstrations": 1})).of(train[1])
    assert nearest.messages[0].content == "two three"
    alone = Neighbours([demonstration("!", "A"), demonstration("?", "B")], recipe)
    assert [other.response for other in alone.of(demonstration("!", "A"))] == ["B"]


def test_an_answer_ends_as_the_template_ends_it(skill: SkillToTeach) -> None:
    """Gemma's and Phi-3's end of a turn is not their end of text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = TEMPLATE.replace("</s>", "<|end|>")
    assert end_of_turn(tokenizer) == end
    lesson = build_lesson(tokenizer, "sort", skill.train[0], [], Recipe())
    assert lesson.response[-1] == end
    assert build_text(tokenizer, "sort", skill.train[0]).response[-1] == tokenizer.eos_token_id
    # A template that ends an answer with an ordinary line break leaves the tokenizer's own.
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_plain_text_for_continued_pretraining(tokenizer: PreTrainedTokenizerFast) -> None:
    lesson = build_text(tokenizer, "s", demonstration("q", "a", context="An article."))
    assert tokenizer.decode(lesson.prompt) == "<s>"
    assert tokenizer.decode(lesson.response) == "An article.</s>"
    assert tokenizer.decode(build_text(tokenizer, "s", demonstration("q", "a")).response) == "q\n\na</s>"
