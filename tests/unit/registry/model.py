"""What the registry promises about one assistant, in plain Python: no database, no verbs of the registry."""

from dataclasses import dataclass, field

OPEN = {"queued", "running", "paused"}
TRIES = 3
"""Workers that an update may lose."""


class Refused(Exception):
    """The model's word for any domain error; `kind` is the error's class name."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass
class ModelVersion:
    number: int
    parent: int | None
    update: "ModelUpdate | None"
    outcome: str | None


@dataclass(eq=False)
class ModelUpdate:
    demonstrations: set[str]
    status: str = "queued"
    fence: int = 0
    parent: int | None = None
    version: int | None = None
    cancel: bool = False
    pause: bool = False
    leased: bool = False
    setbacks: int = 0

    @property
    def has_worker(self) -> bool:
        return self.status == "running" and self.leased

    def end(self, status: str) -> None:
        self.status = "cancelled" if self.cancel and self.version is None else status
        self.leased = False


@dataclass
class Model:
    skills: dict[str, list[str]] = field(default_factory=lambda: {"one": [], "two": []})
    updates: list[ModelUpdate] = field(default_factory=list)
    versions: list[ModelVersion] = field(default_factory=lambda: [ModelVersion(0, None, None, None)])
    aliases: dict[str, tuple[int, int]] = field(default_factory=lambda: {"champion": (0, 1)})
    """(version, revision)"""
    line: list[int] = field(default_factory=lambda: [0])
    """Versions that led to the champion."""

    def accept(self, skill: str, batch: list[str]) -> int:
        new = [one for one in dict.fromkeys(batch) if one not in self.skills[skill]]
        self.skills[skill] += new
        return len(new)

    @property
    def champion(self) -> int:
        return self.aliases["champion"][0]

    def untaught(self) -> dict[str, set[str]]:
        lineage = []
        at: int | None = self.champion
        while at is not None:
            lineage.append(self.versions[at].update)
            at = self.versions[at].parent
        taught: set[str] = set()
        for update in self.updates:
            if update.status in OPEN or update in lineage:
                taught |= update.demonstrations
        return {skill: set(known) - taught for skill, known in self.skills.items()}

    def create_update(self, skill: str | None) -> ModelUpdate:
        untaught = self.untaught()
        chosen = set().union(*untaught.values()) if skill is None else untaught[skill]
        if not chosen:
            raise Refused("NothingToTeach")
        self.updates.append(ModelUpdate(chosen))
        return self.updates[-1]

    def claim(self, update: ModelUpdate) -> int | None:
        """The fence, or None."""
        if update.status == "running" and not update.leased:
            update.setbacks += 1
        elif (
            update.status != "queued"
            or any(one.status == "running" for one in self.updates)
            or update is not next(one for one in self.updates if one.status == "queued")
        ):
            return None
        update.status, update.leased = "running", True
        update.fence += 1
        if update.parent is None:
            update.parent = self.champion
        if update.setbacks >= TRIES:
            update.end("succeeded" if update.version is not None else "failed")
            return None
        return update.fence

    def require_held(self, update: ModelUpdate, fence: int) -> None:
        if update.status != "running" or update.fence != fence:
            raise Refused("StaleFence")

    def publish(self, update: ModelUpdate, fence: int, outcome: str) -> ModelVersion:
        self.require_held(update, fence)
        if update.version is not None:
            return self.versions[update.version]
        if update.cancel:
            raise Refused("UpdateCancelled")
        moves = outcome == "pass"
        if moves and update.parent != self.champion:
            outcome, moves = "hold", False
        made = ModelVersion(len(self.versions), update.parent, update, outcome)
        self.versions.append(made)
        update.version = made.number
        if moves:
            self._point("champion", made.number)
            self.line.append(made.number)
        return made

    def finish(self, update: ModelUpdate, fence: int, status: str) -> None:
        self.require_held(update, fence)
        update.end(status)

    def release(self, update: ModelUpdate, fence: int) -> None:
        self.require_held(update, fence)
        if update.cancel and update.version is None:
            update.end("cancelled")
            return
        update.status = "paused" if update.pause else "queued"
        update.pause = update.leased = False

    def cancel(self, update: ModelUpdate) -> None:
        if update.status not in OPEN or update.version is not None:
            raise Refused("Conflict")
        update.cancel = True
        if not update.has_worker:
            update.end("cancelled")

    def request_pause(self, update: ModelUpdate) -> None:
        if update.status not in ("queued", "running"):
            raise Refused("Conflict")
        if update.has_worker:
            update.pause = True
        else:
            update.status, update.pause, update.leased = "paused", False, False

    def resume(self, update: ModelUpdate) -> None:
        if update.status == "running" and update.pause:
            update.pause = False
        elif update.status == "paused":
            update.status, update.setbacks = "queued", 0
        else:
            raise Refused("Conflict")

    def move(self, alias: str, number: int, expected: int | None, force: bool) -> None:
        if self.versions[number].outcome == "block" and not force:
            raise Refused("Conflict")
        version, revision = self.aliases.get(alias, (None, 0))
        if expected is not None and expected != revision:
            raise Refused("RevisionMismatch")
        if version == number:
            return
        self._point(alias, number)
        if alias == "champion":
            self.line.append(number)

    def roll_back(self, to: int | None) -> None:
        if to == self.champion or (to is None and len(self.line) < 2):
            raise Refused("NothingToRollBackTo")
        target = self.line[-2] if to is None else to
        if target in self.line:
            while self.line[-1] != target:
                self.line.pop()
        elif self.versions[target].outcome == "block":
            raise Refused("Conflict")
        else:
            self.line.append(target)
        self._point("champion", target)

    def _point(self, alias: str, number: int) -> None:
        self.aliases[alias] = (number, self.aliases.get(alias, (0, 0))[1] + 1)
