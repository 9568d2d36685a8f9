"""Linear layers with their weights laid out once as the CPU's matrix units want them.

Without this, oneDNN lays out a bfloat16 weight anew in every call: a quarter of a decoding step.
The results are the same to the bit.
"""

import torch

_ROWS_HINT = 64
"""Rows that the layout is chosen for; others work too."""


def pack(model: torch.nn.Module) -> None:
    """Pack every bfloat16 linear layer that lies on a CPU whose matrix units take them.

    The weight as it was is dropped, unless another layer shares it (tied embeddings): what is left
    has its shape and dtype, and NaN for every value, so that a read of it cannot go unseen.
    """
    # The second is false where the CPU has no instructions for it, and a layout is refused.
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for module in model.modules():
        if type(module) is not torch.nn.Linear or not _suits(module.weight):
            continue
        packed = _PackedForward(module)
        if users[id(module.weight)] == 1:
            nothing = torch.full((1,), torch.nan, dtype=module.weight.dtype)
            module.weight = torch.nn.Parameter(nothing.expand(module.weight.shape), requires_grad=False)
        setattr(module, "forward", packed)  # noqa: B010 - mypy knows no other way to override it


def _suits(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


class _PackedForward:
    def __init__(self, layer: torch.nn.Linear) -> None:
        self._bias = layer.bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS_HINT)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
