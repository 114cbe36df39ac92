"""What is checked before a training begins, so that nothing is computed in vain."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer import TRAINER_STATE_NAME

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from .training_arguments import FSPADTrainingArguments


def check_output_dir(output_dir: str) -> None:
    """Check that checkpoints can be written.

    Args:
        output_dir: Their folder, which is made.

    Raises:
        OSError: If they cannot.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise OSError(
            f"expected a folder that can be written to as output_dir, got {output_dir} ({error.strerror or error}); name "
            "another one."
        ) from error


def find_checkpoint(output_dir: str, wanted: str | bool | None) -> str | None:
    """Find the checkpoint to go on from. Of a run that was killed, the last one may be half written.

    Args:
        output_dir: Folder of the checkpoints.
        wanted: A checkpoint's folder, `True` for the last whole one, `None` or `False` for none; or these as words, as
            a command line gives them.

    Returns:
        Its folder, or `None` to begin anew.

    Raises:
        ValueError: If there is no such checkpoint, or it is not whole.
    """
    word = str(wanted).lower()
    if word in ("none", "false"):
        return None
    if word != "true":
        if not _is_whole(Path(wanted)):
            raise ValueError(
                f"expected the folder of a whole checkpoint, got {wanted}; `true` as resume_from_checkpoint takes the last "
                f"one in {output_dir}."
            )
        return str(wanted)
    whole = [path for path in Path(output_dir).glob("checkpoint-*") if _is_whole(path)]
    if not whole:
        raise ValueError(
            f"expected a whole checkpoint in {output_dir}, got none; leave out resume_from_checkpoint to begin anew."
        )
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2])))


def _is_whole(checkpoint: Path) -> bool:
    # The trainer writes this file after all others.
    try:
        return "global_step" in json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


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
    """Check that streams can be trained on as is asked for, and let each of several processes read them itself.

    Args:
        args: Training arguments, changed in place.
        train_dataset: The training dataset, maybe a stream.
        eval_datasets: The datasets to evaluate on.

    Raises:
        ValueError: If a stream is to be trained on without a number of steps, or to be put onto disk as features; or if
            several processes are to evaluate on one.
    """
    import datasets

    if isinstance(train_dataset, datasets.IterableDataset):
        if args.max_steps <= 0:
            raise ValueError("expected max_steps with a stream, since it does not tell its length, got none")
        if args.features_dir is not None:
            raise ValueError("expected all dialogues at once for features_dir, got a stream: leave out one of the two")
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
