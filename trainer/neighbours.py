"""Which other demonstrations of the skill a teacher prompt begins with."""

import random
import re
from collections.abc import Sequence

import bm25s

from domain.demonstration import Demonstration
from domain.recipe import Recipe

PANELS = 8
"""Different sets of sampled demonstrations that a skill's teacher prompts begin with."""

ANY_TEXT = ""


class Neighbours:
    """Chooses `recipe.num_context_demonstrations` others with another prompt than the demonstration's own.

    `sampled`: from one of PANELS draws, chosen by the prompt, so that the prompts of a panel begin alike
    and a frozen teacher reads the beginning once. Different responses come first, so that a short context
    shows the variety of the skill's answers. `nearest`: by BM25 over the prompts, the nearest last, next to
    the question.
    """

    def __init__(self, train: Sequence[Demonstration], recipe: Recipe) -> None:
        self._train = sorted(train, key=Demonstration.content_hash)
        self._recipe = recipe
        self._index: bm25s.BM25 | None = None
        if recipe.num_context_demonstrations and recipe.demonstration_selection == "nearest":
            self._index = bm25s.BM25()
            self._index.index([_words(other) for other in self._train], show_progress=False)

    def of(self, demonstration: Demonstration) -> list[Demonstration]:
        """The same ones for the same seed."""
        own, count = demonstration.prompt_hash(), self._recipe.num_context_demonstrations
        if count == 0:
            return []
        if self._index is None:
            return self._sampled(own)[:count]
        scores = self._index.get_scores(_words(demonstration))
        ranked = sorted(range(len(self._train)), key=lambda i: (-scores[i], i))
        near = [self._train[i] for i in ranked if self._train[i].prompt_hash() != own]
        return near[:count][::-1]

    def _sampled(self, own: str) -> list[Demonstration]:
        candidates = list(self._train)
        random.Random(f"{self._recipe.seed}:{int(own[:8], 16) % PANELS}").shuffle(candidates)
        chosen: list[Demonstration] = []
        rest: list[Demonstration] = []
        seen: set[str] = set()
        for other in candidates:
            if other.prompt_hash() != own:
                (rest if other.response in seen else chosen).append(other)
                seen.add(other.response)
        return [*chosen, *rest]


def _words(demonstration: Demonstration) -> list[str]:
    """Lower-case words of what the user says, and one that everybody says: BM25's index takes no empty
    text, and a word in all of them ranks none."""
    said = " ".join(message.content for message in demonstration.messages if message.role == "user")
    return [ANY_TEXT, *re.findall(r"\w+", said.lower())]
