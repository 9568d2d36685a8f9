"""Every training knob, serialisable and stored with the version it made."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["sdft", "sft"]
Divergence = Literal["forward", "reverse"]
Teacher = Literal["ema", "parent", "base"]
ParentAdapter = Literal["continue", "merge"]
Context = Literal["instruction", "turns"]
LearningRateSchedule = Literal["cosine", "linear", "constant"]


class Recipe(BaseModel):
    """How one update trains. Defaults are the paper's; `small_model()` is what a small base gets.

    Student s = [x; y], teacher u = [x + demonstration; y], y sampled by the student.
    `divergence` is `forward` KL(teacher || student), as the authors' code and results have it, or
    `reverse` KL(student || teacher), as the paper's text has it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = "sdft"
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    num_epochs: float = Field(default=2.0, gt=0, le=100)
    min_steps: int = Field(
        default=1, ge=1, description="optimizer steps at least; few demonstrations are repeated to fill them"
    )
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=32, ge=1, le=1024)
    warmup_steps: int = Field(default=10, ge=0)
    lr_schedule: LearningRateSchedule = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)

    lora_rank: int = Field(default=16, ge=1, le=512)
    lora_alpha: float = Field(default=32.0, gt=0)
    parent_adapter: ParentAdapter = Field(
        default="continue",
        description="continue: the parent's adapter trains on, at lora_rank; merge: it stays frozen and "
        "fresh factors of lora_rank train beside it, so that the version's rank is the sum",
    )

    temperature: float = Field(default=1.0, gt=0, le=5)
    max_new_tokens: int = Field(default=1024, ge=1)
    divergence: Divergence = "forward"
    teacher: Teacher = "ema"
    teacher_update_rate: float = Field(default=0.02, ge=0, le=1)
    context: Context = "instruction"
    num_context_demonstrations: int = Field(
        default=0, ge=0, le=16, description="other demonstrations shown besides the prompt's own"
    )
    demonstration_repeats: int = Field(
        default=1,
        ge=1,
        le=8,
        description="times the prompt's own demonstration is shown; a small model copies what is repeated",
    )
    skip_first_tokens: int = Field(default=3, ge=0)
    off_policy_share: float = Field(
        default=0.0, ge=0, le=1, description="share of sequences whose tokens are the demonstration's own"
    )
    rehearsal_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of each batch that is general and earlier skills' prompts, "
        "teacher = parent without demonstration",
    )

    max_rehearsal_tokens: int = Field(
        default=256,
        ge=1,
        description="tokens of a rehearsal sample; its beginning decides the format of the answer",
    )
    rollout_every: int = Field(
        default=1,
        ge=1,
        le=16,
        description="optimizer steps served by one round of student samples; 1 is strictly on-policy",
    )

    min_teacher_gap: float = Field(
        default=0.02, ge=-1, le=1, description="smallest teacher minus student score at preflight"
    )
    on_small_gap: Literal["refuse", "train"] = "refuse"
    checkpoint_every: int = Field(default=10, ge=1, description="optimizer steps between checkpoints")
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _rehearsal_leaves_room(self) -> Self:
        if round(self.batch_size * (1 - self.rehearsal_share)) < 1:
            raise ValueError("rehearsal_share leaves no room for a demonstration in the batch")
        return self

    @classmethod
    def paper(cls) -> "Recipe":
        """The paper's recipe carried to LoRA (learning rate about ten times the full one)."""
        return cls()

    @classmethod
    def small_model(cls) -> "Recipe":
        """What a base model below one billion parameters gets; docs/benchmarks.md has the runs behind it.

        Such a model copies its demonstration only when it is repeated, learns labels mostly from
        demonstration tokens, and forgets unless it rehearses. Its teacher is frozen, so that the
        teacher's work on demonstration tokens is done once.
        """
        return cls(
            learning_rate=1.5e-3,
            num_epochs=6.0,
            min_steps=80,
            batch_size=16,
            warmup_steps=5,
            max_new_tokens=32,
            teacher="parent",
            context="turns",
            num_context_demonstrations=0,
            demonstration_repeats=3,
            skip_first_tokens=0,
            off_policy_share=0.75,
            rehearsal_share=0.25,
            max_rehearsal_tokens=24,
            rollout_every=8,
        )

    @classmethod
    def default_for(cls, parameter_count: int) -> "Recipe":
        """The recipe an update gets when it names none; `parameter_count` is the base model's."""
        return cls.small_model() if parameter_count < 1_000_000_000 else cls.paper()
