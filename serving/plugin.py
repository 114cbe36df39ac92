"""What vLLM loads in each of its processes: the architecture of exported heads, and a repair of sampling on processors."""

from __future__ import annotations

from typing import Any

import torch

from . import ARCHITECTURE


def register() -> None:
    """Register exported heads with vLLM. The entry point `fspad` in the group `vllm.general_plugins`."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"fspad.serving.vllm_model:{ARCHITECTURE}")
    if current_platform.is_cpu() and not HAS_TRITON:
        from vllm.utils import cpu_triton_utils

        # Before the platform registers what is there
        cpu_triton_utils._expand_kernel_impl = expand


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: Any = None,  # noqa: N803
) -> None:
    """Repeat what each request asks for, its temperature, top-k or top-p, for each of its drafted tokens.

    vLLM's own for processors without Triton (0.32) writes into a copy, as integers, so that drafts were judged by whatever
    temperature lay in the memory.

    Args:
        output: To be written, of shape `(tokens,)`.
        values: Of each request, of shape `(requests,)`.
        cu_num_tokens: Tokens up to the end of each request, of shape `(requests,)`.
        replace_from: A value that stands for something else.
        replace_to: What it stands for.
        MAX_NUM_TOKENS: Of no use here.
    """
    replaced = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    output.copy_(replaced.repeat_interleave(counts, output_size=output.shape[0]))
