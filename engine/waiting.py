"""The line before the cache: who may start next."""

from bisect import insort
from collections.abc import Callable

from engine.sequence import Sequence


class WaitingLine:
    """Sequences without a row, by priority and then by arrival. Those that somebody reads the answer of go
    before those only scored."""

    def __init__(self) -> None:
        self._generating: list[Sequence] = []
        self._scoring: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._generating) + len(self._scoring)

    def add(self, sequence: Sequence) -> None:
        scored = sequence.params.score_prompt and not sequence.urgent
        queue = self._scoring if scored else self._generating
        insort(queue, sequence, key=lambda one: one.priority)

    def take(self, fits: Callable[[Sequence], bool]) -> Sequence | None:
        """The next to start; None when nobody can.

        One whose common beginning is still being computed is passed over. One that does not fit is
        not: a long one would never find room.
        """
        for queue in (self._generating, self._scoring):
            for position, sequence in enumerate(queue):
                if _must_wait(sequence):
                    continue
                if not fits(sequence):
                    return None
                del queue[position]
                return sequence
        return None

    def drop_aborted(self) -> None:
        for queue in (self._generating, self._scoring):
            for sequence in [one for one in queue if one.aborted]:
                if sequence.leads is not None:
                    sequence.leads.lost = True
                queue.remove(sequence)

    def empty(self) -> list[Sequence]:
        """Take everybody out."""
        everybody = [*self._generating, *self._scoring]
        self._generating.clear()
        self._scoring.clear()
        return everybody


def _must_wait(sequence: Sequence) -> bool:
    if sequence.follows is None:
        return False
    shared, _ = sequence.follows
    return shared.prefix is None and not shared.lost
