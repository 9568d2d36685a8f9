"""What passes between the trainer process and who starts it: one job file in, JSON lines out.

The worker and `ratchet train` start `python -m trainer JOB.json`; the trainer writes one TrainerLine per
line to standard output and logs to standard error. Its exit status is 0 only after a `done` line.
"""

import hashlib
from typing import Annotated, Literal, assert_never

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from domain.demonstration import Demonstration, Message
from domain.preflight import PreflightReport
from domain.recipe import Recipe
from domain.skill import Grader

ROLLOUT_SERVER_AWAY = "rollout_server_away"
"""Code of a failure that passes when the rollout server answers again."""


class SkillToTeach(BaseModel):
    """The demonstrations of one skill in this update and its held-out items."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    grader: Grader
    train: list[Demonstration]
    holdout: list[Demonstration]


class TrainingJob(BaseModel):
    """All that the trainer needs; it knows no database and none of our HTTP."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    update_id: str
    base_path: str
    """Folder of the base model, Hugging Face layout."""
    base_model: str
    parent_adapter_path: str | None
    """Folder of the parent version, an adapter or a full checkpoint; None when the parent is the base."""
    recipe: Recipe
    skills: list[SkillToTeach]
    rehearsal: list[list[Message]] = Field(default_factory=list)
    """General prompts and earlier skills' prompts, each a conversation ending with a user turn."""
    rollout_url: str | None = None
    """An inference server of the base model that draws the student's answers, vLLM or the embedded engine;
    None: the trainer draws them itself. The server reads adapters from `checkpoint_dir`."""
    checkpoint_dir: str
    """The trainer resumes from the newest checkpoint here that verifies."""
    output_dir: str
    """Receives the version: an adapter (PEFT layout) or, with lora_rank 0, a whole Hugging Face folder; must
    not exist or be empty."""

    def fingerprint(self) -> str:
        """sha256 over what decides the result: checkpoints of another recipe or other data don't count."""
        content = self.model_dump_json(
            exclude={"checkpoint_dir", "output_dir", "base_path", "parent_adapter_path", "rollout_url"}
        )
        if self.rollout_url is not None:  # wherever the server is, another engine draws
            content += "\nrollout server"
        return hashlib.sha256(content.encode()).hexdigest()


class PreflightLine(PreflightReport):
    type: Literal["preflight"] = "preflight"


class StepLine(BaseModel):
    """Means over the batch's unmasked response tokens; KL and entropy in nats."""

    type: Literal["step"] = "step"
    step: int
    """1-based optimizer step."""
    steps: int
    loss: float
    teacher_kl: float | None
    """The recipe's divergence from the teacher on demonstrations' prompts; the cross-entropy where a
    supervised method trains. None in a step without such a token."""
    rehearsal_kl: float | None
    base_kl: float | None = None
    """KL(student || base) on what the student drew itself; measured every `kl_to_base_every` steps."""
    entropy: float | None
    response_tokens: float
    """Mean length of the student's samples on demonstrations' prompts, tokens; 0 where there are none."""
    truncated_share: float
    """Of the same samples: those cut at max_new_tokens, which are masked."""
    tokens: int = 0
    """Of all sequences of the step, prompts included."""
    flops: float = 0
    """Of the step's matrix products with weights, as computed (padding included)."""
    grad_norm: float
    learning_rate: float
    rollout_seconds: float
    rollout_gap: float | None = None
    """Mean |log p of the rollout server - log p of the trainer| of a token, nats; None in a step for which no
    server drew."""
    importance_mean: float | None = None
    """Mean over drawn tokens of exp(log p now - log p when drawn), before it is clipped; None where the
    recipe and the engine call for no importance weights."""
    importance_max: float | None = None
    importance_clipped: float | None = None
    """Share of these tokens whose ratio was clipped."""
    teacher_seconds: float
    student_seconds: float
    eta_seconds: float


class CheckpointLine(BaseModel):
    type: Literal["checkpoint"] = "checkpoint"
    step: int
    resumed: bool = False
    """True when the run starts from this checkpoint rather than having written it."""


class HoldoutLine(BaseModel):
    """The student's score on held-out items during training, where the recipe stops early."""

    type: Literal["holdout"] = "holdout"
    step: int
    items: int
    score: float
    best_step: int
    best_score: float


class DoneLine(BaseModel):
    type: Literal["done"] = "done"
    steps: int
    seconds: float


class FailedLine(BaseModel):
    """What ended a trainer from outside and may pass: the next start goes on from the checkpoint."""

    type: Literal["failed"] = "failed"
    code: str
    message: str


class RefusedLine(BaseModel):
    """Preflight found a reason not to train; the update fails with it, and retrying cannot help."""

    type: Literal["refused"] = "refused"
    code: str
    message: str
    param: str | None = None


TrainerLine = Annotated[
    PreflightLine | StepLine | CheckpointLine | HoldoutLine | DoneLine | FailedLine | RefusedLine,
    Field(discriminator="type"),
]
TRAINER_LINE: TypeAdapter[TrainerLine] = TypeAdapter(TrainerLine)


def describe(line: TrainerLine) -> str:
    """One sentence for whoever follows the training."""
    match line:
        case PreflightLine():
            return line.summary()
        case StepLine():
            return f"Step {line.step} of {line.steps}: loss {line.loss:.4f}."
        case CheckpointLine(resumed=True):
            return f"Going on from the checkpoint of step {line.step}."
        case CheckpointLine():
            return f"Checkpoint of step {line.step}."
        case HoldoutLine():
            return (
                f"Held-out score {line.score:.2f} on {line.items} items after step {line.step}; "
                f"best {line.best_score:.2f} after step {line.best_step}."
            )
        case DoneLine():
            return f"Trained {line.steps} steps in {line.seconds:.0f} s."
        case FailedLine() | RefusedLine():
            return line.message
        case _:
            assert_never(line)
