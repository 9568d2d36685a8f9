"""Prompts on which a model is kept as it was while it learns something else."""

from importlib import resources

from domain.demonstration import Message, parse_prompts


def general_prompts() -> list[list[Message]]:
    """The built-in ordinary prompts, each a conversation of one user turn."""
    return parse_prompts((resources.files("domain") / "rehearsal_prompts.jsonl").read_bytes())
