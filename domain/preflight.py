"""What preflight tells about a training job: measurements, and findings that refuse or warn."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

Severity = Literal["error", "warning"]
"""An error refuses the training; a warning is worth knowing and stops nothing."""

FindingCode = Literal[
    "teacher_prompt_too_long",
    "rehearsal_prompt_too_long",
    "empty_response",
    "control_token",
    "degenerate_response",
    "response_masked",
    "duplicate",
    "label_conflict",
    "nothing_held_out",
    "teacher_gap_too_small",
    "teacher_gap_uncertain",
    "reasoning_shortened",
    "answers_truncated",
    "not_enough_memory",
]
PLACES_IN_A_REFUSAL = 3

PlaceSplit = Literal["train", "holdout", "rehearsal"]


class Place(BaseModel):
    """One prompt or demonstration that a finding is about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    skill: str | None
    """None for a rehearsal prompt."""
    split: PlaceSplit
    number: int
    """Its position from 1 in that list of the job."""
    line: int | None = None
    """Its line from 1 in the file that it came from, where it came from one."""
    detail: str
    """What is wrong with this one; quotes its beginning."""
    like: int | None = None
    """`line` of the earlier one that it repeats or contradicts, or its `number` where lines are not known."""

    def name(self) -> str:
        """`line 7`, or `demonstration 7 of skill 'route'` where it has no line."""
        if self.line is not None:
            return f"line {self.line}"
        if self.skill is None:
            return f"rehearsal prompt {self.number}"
        held_out = "held-out " if self.split == "holdout" else ""
        return f"{held_out}demonstration {self.number} of skill {self.skill!r}"


class Finding(BaseModel):
    """One kind of problem, with every place where it was found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: FindingCode
    severity: Severity
    message: str
    """What was found."""
    why: str
    """Why it matters."""
    mend: str
    param: str
    """The field to change, as the HTTP API names it."""
    places: list[Place] = []


class Cost(BaseModel):
    """What the training is expected to take, extrapolated from one measured step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float
    """All steps of the schedule, without loading the model, preflight and checkpoints."""
    rollout_seconds: float
    teacher_seconds: float
    student_seconds: float
    probe_seconds: float
    """What the measuring itself took."""
    parameter_bytes: int
    """Base weights and adapters."""
    peak_bytes: int
    """Expected high-water mark: of the process's resident memory, or of what it allocates on the GPU."""
    available_bytes: int
    """What the process could have in all, now, on the same device."""
    device: str


class PreflightReport(BaseModel):
    """All that is known before the first step. Scores and lengths are of greedy answers to the same held-out
    items; null means not measured, never zero."""

    items: int
    """Held-out items measured."""
    student_score: float | None
    teacher_score: float | None
    gap: float | None
    """Teacher minus student on identical items."""
    gap_low: float | None = None
    gap_high: float | None = None
    """95% interval of the gap, paired."""
    student_tokens: float | None = None
    teacher_tokens: float | None = None
    """Mean length of an answer. Of a thinking model this includes its reasoning, which should not shrink."""
    student_truncated: float | None = None
    teacher_truncated: float | None = None
    """Share of answers that reached max_new_tokens."""
    longest_prompt_tokens: int
    """Longest prompt that is read in training: the teacher's, where the method has one."""
    steps: int
    findings: list[Finding] = []
    cost: Cost | None = None
    """None when it was not asked for, or an error stood before it."""

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "warning"]

    def summary(self) -> str:
        """One sentence: scores with the gap's interval, steps, and what was found."""
        if self.student_score is None:
            text = "Preflight: nothing measured"
        elif self.teacher_score is None:
            text = f"Preflight: student {self.student_score:.2f} on {self.items} held-out items"
        else:
            text = (
                f"Preflight: student {self.student_score:.2f}, teacher {self.teacher_score:.2f} "
                f"on {self.items} held-out items"
            )
        if self.gap is not None and self.gap_low is not None and self.gap_high is not None:
            text += f", gap {self.gap:+.2f} [{self.gap_low:+.2f}, {self.gap_high:+.2f}]"
        return f"{text}; {self.steps} steps."

    def refusal(self) -> str:
        """All errors in one paragraph, each with a few of its places and how to mend it; empty without."""
        told = []
        for finding in self.errors:
            places = [f"{place.name()}: {place.detail}" for place in finding.places[:PLACES_IN_A_REFUSAL]]
            more = len(finding.places) - len(places)
            if more:
                places.append(f"and {more} more")
            where = f" {'; '.join(places)}." if places else ""
            told.append(f"{finding.message}{where} {finding.mend}")
        return " ".join(told)

    def with_fewer_places(self, most: int) -> Self:
        """A copy that names at most `most` places for each finding; the messages still count all."""
        short = [one.model_copy(update={"places": one.places[:most]}) for one in self.findings]
        return self.model_copy(update={"findings": short})
