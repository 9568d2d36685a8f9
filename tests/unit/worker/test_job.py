"""The rehearsal that an update gets."""

from domain.demonstration import Message
from worker.job import rehearsal_prompts


def prompts(word: str, count: int) -> list[list[Message]]:
    return [[Message(role="user", content=f"{word} {number}")] for number in range(count)]


def test_few_earlier_prompts_are_all_rehearsed() -> None:
    general, taught = prompts("general", 5), prompts("taught", 4)
    assert rehearsal_prompts(general, taught, "upd_a") == general + taught


def test_earlier_skills_never_outnumber_general_prompts() -> None:
    general, taught = prompts("general", 5), prompts("taught", 100)
    drawn = rehearsal_prompts(general, taught, "upd_a")
    assert drawn[:5] == general
    assert len(drawn) == 10
    assert all(prompt in taught for prompt in drawn[5:])
    assert len({prompt[0].content for prompt in drawn}) == 10
    assert rehearsal_prompts(general, taught, "upd_a") == drawn
    assert rehearsal_prompts(general, taught, "upd_b") != drawn
