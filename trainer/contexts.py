"""What the student and the teacher are shown: token ids of prompts, with and without demonstrations."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from domain.demonstration import Demonstration, Message
from domain.recipe import Context, Recipe
from domain.training import SkillToTeach

INSTRUCTION = (
    "{question}\n\nThis is an example for a response to the question:\n{response}\n\n"
    "Now answer with a response of your own, including the thinking process."
)
"""The paper's wording, without the leading newline of its code."""


PANELS = 8
"""Different sets of other demonstrations that a skill's teacher prompts begin with."""


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
    demonstration: Demonstration, others: Sequence[Demonstration], context: Context, repeats: int = 1
) -> list[Message]:
    """The conversation that the teacher answers: `others`, then the prompt with its own demonstration.

    `turns` shows the demonstration as `repeats` earlier turns and asks again; `instruction` shows it
    inside the question, as the paper does, after `repeats` - 1 such turns. The demonstration's own
    `context` (an article, feedback) stands before its question. System messages of the others are left
    out.
    """
    system = [m for m in demonstration.messages if m.role == "system"]
    conversation = [m for m in demonstration.messages if m.role != "system"]
    informed = _with_context(conversation, demonstration.context)
    shown: list[Message] = []
    for other in others:
        turns = [m for m in other.messages if m.role != "system"]
        shown += [*_with_context(turns, other.context), _answer(other)]
    if context == "turns":
        return [*system, *shown, *[*informed, _answer(demonstration)] * repeats, *conversation]
    shown += [*informed, _answer(demonstration)] * (repeats - 1)
    question = INSTRUCTION.format(question=informed[-1].content, response=demonstration.response)
    return [*system, *shown, *informed[:-1], Message(role="user", content=question)]


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


def choose_others(
    demonstration: Demonstration, train: Sequence[Demonstration], count: int, seed: int
) -> list[Demonstration]:
    """`count` demonstrations of the same skill with other prompts, the same ones for the same seed.

    They come from one of PANELS draws, chosen by the prompt: prompts of a panel begin alike, so that a
    frozen teacher reads the beginning once. Different responses come first, so that a short context
    shows the variety of the skill's answers.
    """
    own = demonstration.prompt_hash()
    panel = int(own[:8], 16) % PANELS
    candidates = sorted(train, key=Demonstration.content_hash)
    random.Random(f"{seed}:{panel}").shuffle(candidates)
    chosen: list[Demonstration] = []
    rest: list[Demonstration] = []
    seen: set[str] = set()
    for other in candidates:
        if other.prompt_hash() == own:
            continue
        (rest if other.response in seen else chosen).append(other)
        seen.add(other.response)
    return [*chosen, *rest][:count]


def build_lesson(
    tokenizer: PreTrainedTokenizerBase,
    skill: SkillToTeach,
    demonstration: Demonstration,
    recipe: Recipe,
) -> Lesson:
    """Student prompt, teacher prompt and response of one demonstration, as token ids."""
    others = choose_others(demonstration, skill.train, recipe.num_context_demonstrations, recipe.seed)
    shown = teacher_messages(demonstration, others, recipe.context, recipe.demonstration_repeats)
    teacher_prompt = chat_tokens(tokenizer, shown)
    opening = shown[: _opening_messages(demonstration, others)]
    beginning = chat_tokens(tokenizer, opening, answer_next=False) if opening else []
    response: list[int] = tokenizer(demonstration.response, add_special_tokens=False)["input_ids"]
    return Lesson(
        skill=skill.name,
        demonstration=demonstration,
        prompt=chat_tokens(tokenizer, demonstration.messages),
        teacher_prompt=teacher_prompt,
        # A template may write a beginning differently once more follows: then nothing is shared.
        shared_tokens=len(beginning) if teacher_prompt[: len(beginning)] == beginning else 0,
        response=[*response, tokenizer.eos_token_id],
    )
