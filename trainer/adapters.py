"""Which adapters of PEFT a head can be trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


def check_virtual_tokens(target: PreTrainedModel) -> None:
    """Check that a target sees the tokens of a dialogue and no others.

    Args:
        target: The target, maybe wrapped by PEFT.

    Raises:
        ValueError: If prompt tuning, prefix tuning or the like puts virtual tokens before its inputs.
    """
    adapter = getattr(target, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            f"expected a target without virtual tokens, got one with {adapter.peft_type.value}: a head cannot draft for "
            "it. Adapt the weights of the target instead, as LoRA does."
        )


def check_adapter(peft_config: PeftConfig) -> None:
    """Check that an adapter can be put on a head.

    Args:
        peft_config: The adapter's configuration.

    Raises:
        ValueError: If it has a task type.
    """
    if peft_config.task_type is not None:
        raise ValueError(
            f"expected an adapter without a task type, got {peft_config.task_type}: PEFT's wrappers for tasks pass on "
            "other inputs than a head takes. Leave `task_type` out of the adapter's configuration."
        )
