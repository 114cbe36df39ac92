"""Linear layers laid out as the processor multiplies them, to draft with.

torch keeps a weight row by row, and oneDNN lays it out anew for every product. With the few rows of a level of drafting that
takes as long as the product itself: on an AMD EPYC the layers of a head with 7.7M weights and 8,192 rows of its LM head take
3.0 ms for 8 rows in bfloat16 and 1.7 when laid out before, 6.2 and 2.8 in float32. Laying them out takes 10 to 20 ms, so a
call of `generate` does it once, and forgets it at its end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

# Rows of a product that the layout is made for; others are computed as well
_NUM_ROWS = 8


class PackedLinear(nn.Module):
    """Computes what a linear layer computes, without gradients.

    Args:
        weight: Of shape `(out, in)`, on the processor. It is copied, and later changes of it are not seen.
        bias: Of shape `(out,)`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _NUM_ROWS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(..., in)` to `(..., out)`."""
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.weight, self.bias, "none", [], "")


def can_pack(weight: torch.Tensor) -> bool:
    """Whether a weight can be laid out: a plain tensor on an x86 processor that has kernels for its dtype.

    Args:
        weight: The weight.
    """
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.device.type != "cpu":
        return False
    # Layers under autocast get inputs of another dtype than their weight's
    return not torch.is_autocast_enabled("cpu") and _has_kernels(weight.dtype)


@cache
def _has_kernels(dtype: torch.dtype) -> bool:
    """Whether packed layers work, tried once, because torch documents neither the functions nor what they support."""
    if not dtype.is_floating_point or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    weight = torch.linspace(-1, 1, 32 * 32).view(32, 32).to(dtype)
    try:
        packed = PackedLinear(weight)(weight[None])
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(packed, nn.functional.linear(weight[None], weight), atol=1e-2, rtol=1e-2)


def packed(model: nn.Module) -> nn.Module:
    """A copy of a model that computes the same with packed layers. Whatever is no linear layer is shared.

    Args:
        model: The model, which is not changed.

    Returns:
        The copy, or the model itself if some part of it computes in a way of its own, compiled or with hooks.
    """
    if any("forward" in vars(part) or part._compiled_call_impl is not None for part in model.modules()):
        return model

    def pack(module: nn.Module) -> nn.Module:
        has_hooks = module._forward_hooks or module._forward_pre_hooks
        if type(module) is nn.Linear and not has_hooks and can_pack(module.weight):
            return PackedLinear(module.weight, module.bias)
        return module

    return copied(model, pack)


def copied(module: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of a module that shares its parameters and buffers.

    Args:
        module: The module, which is not changed.
        change: Gets the copy of every part, and returns what takes its place.
    """
    other = copy.copy(module)
    other._modules = {name: part if part is None else copied(part, change) for name, part in module._modules.items()}
    return change(other)
