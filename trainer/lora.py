"""The LoRA layer that trains: PEFT's parameters, one fused product, and an explicit choice of adapter."""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional


class _LoraProduct(torch.autograd.Function):
    """x W^T + bias + scaling * (x A^T) B^T, with W frozen and A, B in float32.

    PEFT's own forward casts activations to the adapter's dtype and back; here only A and B (small) are
    cast, so that every product runs in the activations' dtype, and the backward pass makes no
    gradient for W.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a_cast = a.to(x.dtype)
        b_cast = (b * scaling).to(x.dtype)
        low = rows @ a_cast.T
        out = functional.linear(rows, weight, bias)
        out.addmm_(low, b_cast.T)
        ctx.save_for_backward(rows, low, a_cast, b_cast, weight)
        ctx.scaling = scaling
        ctx.x_shape = x.shape
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> tuple[Tensor | None, ...]:
        rows, low, a, b, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_low = grad @ b
        grad_x = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            grad_x = grad @ weight
            grad_x.addmm_(grad_low, a)
            grad_x = grad_x.view(ctx.x_shape)  # type: ignore[attr-defined]
        grad_a = (grad_low.T @ rows).float()
        grad_b = (grad.T @ low).float() * ctx.scaling  # type: ignore[attr-defined]
        return grad_x, None, None, grad_a, grad_b, None


class LoraLinear(lora.Linear):
    """A linear layer that runs with the adapters named by `selected`, or as the base when there are none."""

    selected: tuple[str, ...] = ()
    _cast: tuple[tuple[object, ...], Tensor, Tensor] | None = None
    """A and scaled B of the last pass without gradients in the activations' dtype, and what they were made
    from: decoding runs hundreds of such passes with the same weights."""

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The adapter's A, [rank, in], and B, [out, rank]."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        return a, b

    def product(self, adapters: tuple[str, ...]) -> tuple[Tensor, Tensor, float]:
        """A, B and scaling whose one product is the sum of the adapters' products: their factors side by
        side, under the last one's scaling. Gradients reach each adapter's own factors."""
        scaling: float = self.scaling[adapters[-1]]
        if len(adapters) == 1:
            return *self.matrices(adapters[0]), scaling
        pairs = [self.matrices(adapter) for adapter in adapters]
        rescaled = [
            b * (self.scaling[adapter] / scaling) for adapter, (_, b) in zip(adapters, pairs, strict=True)
        ]
        return torch.cat([a for a, _ in pairs]), torch.cat(rescaled, dim=1), scaling

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        assert isinstance(base, nn.Linear)
        if not self.selected:
            return functional.linear(x, base.weight, base.bias)
        if not torch.is_grad_enabled():
            a, b = self._cast_product(x.dtype)
            out = functional.linear(x, base.weight, base.bias)
            out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ a.T, b.T)
            return out
        self._cast = None
        trained: Tensor = _LoraProduct.apply(x, base.weight, base.bias, *self.product(self.selected))
        return trained

    def _cast_product(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # A change in place, an optimizer's step among them, raises a tensor's version.
        versions = [tensor._version for name in self.selected for tensor in self.matrices(name)]
        key = (self.selected, dtype, *versions)
        if self._cast is None or self._cast[0] != key:
            a, b, scaling = self.product(self.selected)
            self._cast = key, a.to(dtype), (b * scaling).to(dtype)
        return self._cast[1], self._cast[2]


def use_fused_layer(config: lora.LoraConfig) -> lora.LoraConfig:
    """Let PEFT build `LoraLinear` wherever it would build its own linear layer."""
    config._register_custom_module({nn.Linear: LoraLinear})
    return config
