"""A ledger with one update that waits for a worker."""

from tests.unit.registry import steps


class Ledger(steps.Ledger):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        assistant = self.assistant()
        self.teach(assistant, self.skill(assistant), steps.lines(0, 1))
        self.update = self.queue(assistant)
