"""What several processes cannot do, or need to be told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .training_arguments import FSPADTrainingArguments


def check_fsdp(accelerator: Accelerator, num_draft_steps: int) -> None:
    """Check that a layer is not run again with a cache that has its keys and values already.

    Args:
        accelerator: The trainer's.
        num_draft_steps: Draft steps that are trained; from the second on there is a cache.

    Raises:
        ValueError: If FSDP's own activation checkpointing is on with several draft steps.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if num_draft_steps > 1 and plugin is not None and plugin.activation_checkpointing:
        raise ValueError(
            "expected FSDP without its own activation checkpointing with num_draft_steps > 1, got "
            "`activation_checkpointing` in `fsdp_config`: turn it off, and on in the training arguments instead, where "
            "older releases call it `gradient_checkpointing`."
        )


def check_streams(args: FSPADTrainingArguments, train_dataset: Any, eval_datasets: list[Any]) -> None:
    """Check that several processes can share the datasets, and let each of them read streams itself.

    Args:
        args: Training arguments, changed in place.
        train_dataset: The training dataset, maybe a stream.
        eval_datasets: The datasets to evaluate on.

    Raises:
        ValueError: If several processes are to evaluate on a stream.
    """
    import datasets

    if args.world_size == 1:
        return
    if any(isinstance(dataset, datasets.IterableDataset) for dataset in eval_datasets):
        raise ValueError(
            f"expected a `datasets.Dataset` to evaluate on in {args.world_size} processes, got a stream, of whose last "
            "rows some would count twice; load it without `streaming=True`."
        )
    if isinstance(train_dataset, datasets.IterableDataset) and args.accelerator_config.dispatch_batches is None:
        # By default the first process would put the batches of all into one, but each has a length of its own.
        args.accelerator_config.dispatch_batches = False
