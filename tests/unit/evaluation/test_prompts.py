"""The built-in prompts: what is rehearsed is not what measures."""

from domain.rehearsal import general_prompts
from evaluation.benchmarks import load_ordinary


def test_no_prompt_of_the_leak_check_is_rehearsed() -> None:
    rehearsed = {messages[-1].content for messages in general_prompts()}
    assert len(rehearsed) > 200
    assert [item.prompt for item in load_ordinary(None) if item.prompt in rehearsed] == []
