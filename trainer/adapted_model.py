"""LoRA: one frozen base in memory and an adapter on it for each role."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from domain.errors import TrainingRefused
from domain.recipe import Recipe
from trainer import distributed, sharding
from trainer.adapter_files import SavedAdapter, read_adapter, write_adapter
from trainer.lora import LoraLinear, use_fused_layer
from trainer.model import Model, Role
from trainer.sharding import Trunk


class AdaptedModel(Model):
    """A frozen base with an adapter for each role.

    An update that starts from an adapter either continues it, so that all of it trains on, or merges it
    (`recipe.parent_adapter`): then it stays frozen under every role, fresh factors train beside it, and
    what is saved is one adapter, the two side by side.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        parent_adapter: Path | None,
    ) -> None:
        """Attach adapters to `base`; the student starts from exactly the parent's product, or from zero.

        Raises TrainingRefused when the parent does not fit the base, or continuing it would drop ranks.
        """
        super().__init__(tokenizer, base)
        torch.manual_seed(recipe.seed)
        config = _lora_config(recipe.lora_rank, recipe.lora_alpha)
        self._peft = get_peft_model(base, config, adapter_name="student")
        self._layers = {
            name: module for name, module in base.named_modules() if isinstance(module, LoraLinear)
        }
        self._has_parent = parent_adapter is not None
        self._merged = parent_adapter is not None and recipe.parent_adapter == "merge"
        if parent_adapter is not None:
            saved = read_adapter(parent_adapter)
            self._check_fits(saved)
            if self._merged:
                self._add("parent", _lora_config(saved.rank, saved.alpha))
                self._fill("parent", saved)
            else:
                self._continue(saved, recipe)
                self._add("parent", config)
                self._copy_student("parent")
        if recipe.teacher == "ema":
            self._add("ema", config)
            self._copy_student("ema")
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(".student." in name)
        base.eval()
        self._base = Trunk(base)
        if self._lockstep:
            # Adapters stay whole everywhere: they are small, and their gradients are summed once per step.
            adapters = [p for name, p in base.named_parameters() if ".lora_" in name]
            sharding.shard(self._base, self._base.head.dtype, replicated=adapters)
        self._use(None)
        self._try_packing()

    def has(self, role: Role | None) -> bool:
        return role is None or role in self._peft.peft_config

    def parent(self) -> Role | None:
        return "parent" if self._has_parent else None

    def parameters(self, role: Role) -> dict[str, Tensor]:
        """The role's own matrices A and B; a merged parent's are not among the student's."""
        found: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            found[f"{name}.lora_A"], found[f"{name}.lora_B"] = layer.matrices(role)
        return found

    def updated(self, role: Role) -> None:
        """Nothing: the matrices themselves run."""

    def save_student(self, folder: Path, base_model: str) -> None:
        """Write one PEFT adapter folder with the whole product, a merged parent's included."""
        self.save_adapter("student", folder, base_model)

    def save_adapter(self, role: Role, folder: Path, base_model: str) -> None:
        """`save_student` for any role."""
        if not distributed.is_first():
            return
        adapters = self._adapters(role)
        products = {name: layer.product(adapters) for name, layer in self._layers.items()}
        a, _, scaling = next(iter(products.values()))
        rank = a.shape[0]
        matrices = {name: (a, b) for name, (a, b, _) in products.items()}
        settings: dict[str, Any] = self._peft.peft_config[role].to_dict()
        write_adapter(folder, SavedAdapter(rank, scaling * rank, matrices), settings, base_model)

    def _use(self, role: Role | None) -> None:
        super()._use(role)
        adapters = () if role is None else self._adapters(role)
        for layer in self._layers.values():
            layer.selected = adapters

    def _finish_gradients(self) -> None:
        distributed.add_up_gradients(self.parameters("student").values())

    def _trunk(self, role: Role | None) -> Trunk:
        return self._base

    def _adapters(self, role: Role) -> tuple[str, ...]:
        """Those whose products add up to the role."""
        return ("parent", role) if self._merged and role != "parent" else (role,)

    def _add(self, role: Role, config: LoraConfig) -> None:
        self._peft.add_adapter(role, config)

    @torch.no_grad()
    def _fill(self, role: Role, saved: SavedAdapter) -> None:
        """Put a saved adapter in the first rows of A and columns of B, and zeros in the other columns."""
        for name, layer in self._layers.items():
            a, b = layer.matrices(role)
            saved_a, saved_b = saved.matrices[name]
            a[: saved.rank] = saved_a.to(a)
            b.zero_()
            b[:, : saved.rank] = saved_b.to(b) * (saved.scaling / layer.scaling[role])

    def _copy_student(self, role: Role) -> None:
        source = self.parameters("student")
        with torch.no_grad():
            for name, parameter in self.parameters(role).items():
                parameter.copy_(source[name])

    def _continue(self, saved: SavedAdapter, recipe: Recipe) -> None:
        if saved.rank > recipe.lora_rank:
            raise TrainingRefused(
                f"The parent version's adapter has rank {saved.rank}; lora_rank {recipe.lora_rank} would "
                f"drop part of it. Use lora_rank {saved.rank} or more, or parent_adapter 'merge'.",
                param="recipe.lora_rank",
                code="lora_rank_below_parent",
            )
        self._fill("student", saved)

    def _check_fits(self, saved: SavedAdapter) -> None:
        for name in sorted(self._layers.keys() ^ saved.matrices.keys()):
            where = "the parent adapter lacks" if name in self._layers else "the base model lacks"
            raise TrainingRefused(
                f"The parent adapter is not one of this base: {where} {name!r}.",
                code="parent_adapter_mismatch",
            )
        for name, layer in self._layers.items():
            outputs, inputs = layer.weight.shape
            found = [list(matrix.shape) for matrix in saved.matrices[name]]
            expected = [[saved.rank, inputs], [outputs, saved.rank]]
            if found != expected:
                raise TrainingRefused(
                    f"The parent adapter's matrices of {name!r} are {found[0]} and {found[1]}; its rank and "
                    f"the base need {expected[0]} and {expected[1]}.",
                    code="parent_adapter_mismatch",
                )


def _lora_config(rank: int, alpha: float) -> LoraConfig:
    return use_fused_layer(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    )
