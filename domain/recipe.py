"""Every training knob, serialisable and stored with the version it made."""

import re
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["sdft", "sft", "dft", "cpt", "sft_reinvoke", "offline_distillation"]
Divergence = Literal["forward", "reverse", "jsd"]
Teacher = Literal["ema", "parent", "base", "live"]
Context = Literal["instruction", "turns", "knowledge", "feedback", "template"]
LearningRateSchedule = Literal["cosine", "linear", "constant"]

TEMPLATE_FIELD = re.compile(r"\{(question|response|context)\}")
"""What a context template is filled with."""


class Recipe(BaseModel):
    """How one update trains. Defaults are the paper's; `small_model()` is what a small base gets.

    Student s = [x; y], teacher u = [x + demonstration; y], y sampled by the student.
    `divergence` is `forward` KL(teacher || student), as the authors' code and results have it,
    `reverse` KL(student || teacher), as the paper's text has it, or `jsd`, between them by `jsd_beta`.

    `method` is `sdft` or a control on the same loop and data: `sft` (cross-entropy on demonstrations),
    `dft` (the same weighted by the token's own probability, arXiv 2508.05629), `cpt` (next token over the
    demonstration's context, or its prompt and response, as plain text), `sft_reinvoke` (sft, then
    `reinvoke_steps` of rehearsal alone), `offline_distillation` (the teacher's own answers, sampled once).
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

    lora_rank: int = Field(default=16, ge=0, le=512, description="0 trains every weight")
    lora_alpha: float = Field(default=32.0, gt=0)
    parent_adapter: Literal["continue", "merge"] = Field(
        default="continue",
        description="continue trains on the parent version's adapter; merge freezes it beside a fresh one",
    )

    temperature: float = Field(default=1.0, gt=0, le=5)
    top_p: float = Field(default=1.0, gt=0, le=1, description="of sampling alone; the loss sees every token")
    max_new_tokens: int = Field(default=1024, ge=1)
    rollouts_per_prompt: int = Field(
        default=1,
        ge=1,
        le=64,
        description="samples on each prompt, which divide its weight in the loss; batch_size counts prompts",
    )
    divergence: Divergence = "forward"
    jsd_beta: float = Field(
        default=0.5, gt=0, lt=1, description="jsd: weight of the teacher in the mixture and of its KL"
    )
    divergence_top_k: int | None = Field(
        default=None,
        ge=1,
        description="compare this many tokens and one tail bucket; null is the whole vocabulary, exact",
    )
    top_k_support: Literal["teacher", "student"] = Field(
        default="teacher", description="whose most probable tokens divergence_top_k takes"
    )
    importance_clip: float | None = Field(
        default=None,
        ge=1,
        description="weigh a sampled token by exp(log p now - log p when drawn), at most this; null: by 1, "
        "or at most 2 where a rollout server drew it",
    )
    teacher: Teacher = "ema"
    teacher_update_rate: float = Field(default=0.02, ge=0, le=1)
    context: Context = "instruction"
    context_template: str | None = Field(
        default=None,
        max_length=20_000,
        description="context 'template': the teacher's question, with {question}, {response}, {context}",
    )
    num_context_demonstrations: int = Field(
        default=0, ge=0, le=16, description="other demonstrations shown besides the prompt's own"
    )
    demonstration_selection: Literal["sampled", "nearest"] = Field(
        default="sampled", description="how the other demonstrations are chosen; nearest is by BM25"
    )
    demonstration_repeats: int = Field(
        default=1,
        ge=1,
        le=8,
        description="times the prompt's own demonstration is shown; a small model copies what is repeated",
    )
    skip_first_tokens: int = Field(default=3, ge=0)
    off_policy_share: float = Field(
        default=0.0, ge=0, le=1, description="share of prompts whose tokens are the demonstration's own"
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

    reinvoke_steps: int = Field(
        default=0, ge=0, description="sft_reinvoke: steps of rehearsal alone after the supervised ones"
    )
    offline_targets: Literal["tokens", "distribution"] = Field(
        default="tokens",
        description="offline_distillation: cross-entropy on the teacher's answers, or its divergence there",
    )

    min_teacher_gap: float = Field(
        default=0.02, ge=-1, le=1, description="smallest teacher minus student score at preflight"
    )
    on_small_gap: Literal["refuse", "train"] = "refuse"
    checkpoint_every: int = Field(default=10, ge=1, description="optimizer steps between checkpoints")
    early_stop_every: int | None = Field(
        default=None,
        ge=1,
        description="score the held-out items every so many steps and keep the best weights; null: never",
    )
    early_stop_patience: int = Field(
        default=3, ge=1, description="stop after so many scores in a row without a better one"
    )
    kl_to_base_every: int = Field(
        default=10, ge=0, description="steps between measurements of the KL to the base; 0: never"
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _rehearsal_leaves_room(self) -> Self:
        if self.batch_size * (1 - self.rehearsal_share) < 1 - 1e-9:
            raise ValueError("rehearsal_share leaves no room for a demonstration in each batch of batch_size")
        return self

    @model_validator(mode="after")
    def _template_is_used(self) -> Self:
        if (self.context == "template") != (self.context_template is not None):
            raise ValueError("context 'template' and context_template come together")
        if self.context_template is not None:
            names = set(TEMPLATE_FIELD.findall(self.context_template))
            if "question" not in names or len(names) == 1:
                raise ValueError("context_template must hold {question} and {response} or {context}")
        return self

    @model_validator(mode="after")
    def _feedback_shows_no_response(self) -> Self:
        if self.context == "feedback" and self.demonstration_repeats > 1:
            raise ValueError("context 'feedback' shows no response: demonstration_repeats must be 1")
        return self

    @model_validator(mode="after")
    def _reinvokes(self) -> Self:
        if (self.method == "sft_reinvoke") != (self.reinvoke_steps > 0):
            raise ValueError("method 'sft_reinvoke' and reinvoke_steps above 0 come together")
        return self

    @property
    def version_kind(self) -> Literal["adapter", "full"]:
        """What the update's version is made of."""
        return "adapter" if self.lora_rank > 0 else "full"

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

    @classmethod
    def completed(cls, given: Mapping[str, object], parameter_count: int) -> "Recipe":
        """`given` fields, and the default for a base model of that size in all others.

        All weights train at a tenth of an adapter's learning rate, as in the paper, unless one is given.
        Raises pydantic's ValidationError.
        """
        recipe = cls.model_validate(cls.default_for(parameter_count).model_dump() | dict(given))
        if recipe.version_kind == "full" and "learning_rate" not in given:
            recipe = recipe.model_copy(update={"learning_rate": recipe.learning_rate / 10})
        return recipe
