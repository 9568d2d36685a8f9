"""What the student and the teacher are shown: token ids of prompts, with and without demonstrations."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from domain.demonstration import Demonstration, Message
from domain.errors import TrainingRefused
from domain.recipe import TEMPLATE_FIELD, Recipe

INSTRUCTION = (
    "{question}\n\nThis is an example for a response to the question:\n{response}\n\n"
    "Now answer with a response of your own, including the thinking process."
)
"""The paper's wording, without the leading newline of its code."""


KNOWLEDGE = (
    "{context}\n\nUse the text above to answer.\n\n{question}\n\nThis is a right answer:\n{response}\n\n"
    "Now answer with a response of your own."
)
FEEDBACK = (
    "{question}\n\nThis was said about an earlier answer to the question:\n{context}\n\n"
    "Now answer with a response of your own that takes it into account."
)
"""Shows no response: the model conditions on whatever text the demonstration's context holds."""


@dataclass(frozen=True)
class Lesson:
    """One demonstration as token ids."""

    skill: str
    demonstration: Demonstration
    prompt: list[int]
    """The student's: the conversation and the generation prompt."""
    teacher_prompt: list[int]
    shared_tokens: int
    """Tokens at the beginning of `teacher_prompt` that come from the other demonstrations."""
    response: list[int]
    """The demonstration's response and the end-of-turn token."""


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer_next: bool = True
) -> list[int]:
    """The conversation by the model's chat template, ending where the assistant's answer begins."""
    text = tokenizer.apply_chat_template(
        [message.model_dump() for message in messages], tokenize=False, add_generation_prompt=answer_next
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def teacher_messages(
    demonstration: Demonstration, others: Sequence[Demonstration], recipe: Recipe
) -> list[Message]:
    """The conversation that the teacher answers: `others`, then the prompt with its own demonstration.

    `turns` shows the demonstration as `demonstration_repeats` earlier turns and asks again; the other
    contexts put it inside the question, after one such turn less. The demonstration's own `context` (an
    article, feedback) stands before its question, or where the template has {context}. System messages of
    the others are left out.

    Raises TrainingRefused when the template shows a context and the demonstration has none.
    """
    system = [m for m in demonstration.messages if m.role == "system"]
    conversation = [m for m in demonstration.messages if m.role != "system"]
    informed = _with_context(conversation, demonstration.context)
    shown: list[Message] = []
    for other in others:
        turns = [m for m in other.messages if m.role != "system"]
        shown += [*_with_context(turns, other.context), _answer(other)]
    turn = [*informed, _answer(demonstration)]
    if recipe.context == "turns":
        return [*system, *shown, *turn * recipe.demonstration_repeats, *conversation]
    shown += turn * (recipe.demonstration_repeats - 1)
    asked = Message(role="user", content=_question(demonstration, recipe))
    return [*system, *shown, *conversation[:-1], asked]


def _question(demonstration: Demonstration, recipe: Recipe) -> str:
    """The last user message with the demonstration inside it."""
    templates = {"instruction": INSTRUCTION, "knowledge": KNOWLEDGE, "feedback": FEEDBACK}
    template = recipe.context_template or templates[recipe.context]
    question = demonstration.messages[-1].content
    if "{context}" not in template:
        question = _with_context(demonstration.messages, demonstration.context)[-1].content
    elif demonstration.context is None:
        raise TrainingRefused(
            f"Context {recipe.context!r} shows each demonstration's `context`, and the one that asks "
            f"“{question[:60]}” has none.",
            param="recipe.context",
            code="context_missing",
        )
    filled = {
        "question": question,
        "response": demonstration.response,
        "context": demonstration.context or "",
    }
    # One pass, so that braces inside a demonstration stay what they are.
    return TEMPLATE_FIELD.sub(lambda field: filled[field[1]], template)


def _opening_messages(demonstration: Demonstration, others: Sequence[Demonstration]) -> int:
    """How many of the teacher's messages come before the own demonstration."""
    if not others:
        return 0
    system = sum(m.role == "system" for m in demonstration.messages)
    turns = [sum(m.role != "system" for m in other.messages) + 1 for other in others]
    return system + sum(turns)


def _answer(demonstration: Demonstration) -> Message:
    return Message(role="assistant", content=demonstration.response)


def _with_context(conversation: list[Message], context: str | None) -> list[Message]:
    if context is None:
        return conversation
    last = conversation[-1]
    return [*conversation[:-1], Message(role=last.role, content=f"{context}\n\n{last.content}")]


def build_lesson(
    tokenizer: PreTrainedTokenizerBase,
    skill: str,
    demonstration: Demonstration,
    others: Sequence[Demonstration],
    recipe: Recipe,
) -> Lesson:
    """Student prompt, teacher prompt and response of one demonstration, as token ids."""
    shown = teacher_messages(demonstration, others, recipe)
    teacher_prompt = chat_tokens(tokenizer, shown)
    opening = shown[: _opening_messages(demonstration, others)]
    beginning = chat_tokens(tokenizer, opening, answer_next=False) if opening else []
    # A template may write a beginning differently once more follows; and neighbours are seldom the same.
    shares = recipe.demonstration_selection == "sampled" and teacher_prompt[: len(beginning)] == beginning
    return Lesson(
        skill=skill,
        demonstration=demonstration,
        prompt=chat_tokens(tokenizer, demonstration.messages),
        teacher_prompt=teacher_prompt,
        shared_tokens=len(beginning) if shares else 0,
        response=_tokens(tokenizer, demonstration.response, end=end_of_turn(tokenizer)),
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the chat template puts behind an answer, which is not every tokenizer's end of text."""
    asked, answer = Message(role="user", content="Say yes."), "Yes."
    whole = tokenizer.apply_chat_template(
        [asked.model_dump(), Message(role="assistant", content=answer).model_dump()], tokenize=False
    )
    assert isinstance(whole, str)
    behind = _tokens(tokenizer, whole.rpartition(answer)[2])
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    if behind and behind[0] in special:
        return behind[0]
    return int(tokenizer.eos_token_id)


def build_text(tokenizer: PreTrainedTokenizerBase, skill: str, demonstration: Demonstration) -> Lesson:
    """The demonstration's context, or its prompt and response, as one text without a chat template."""
    said = [message.content for message in demonstration.messages]
    text = demonstration.context or "\n\n".join([*said, demonstration.response])
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return Lesson(
        skill=skill,
        demonstration=demonstration,
        prompt=[start],
        teacher_prompt=[start],
        shared_tokens=0,
        response=_tokens(tokenizer, text, end=tokenizer.eos_token_id),
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, end: int | None = None) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if end is None else [*ids, end]
