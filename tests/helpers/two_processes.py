"""Trainings that must come out the same in one process and in two, each of which calls `main`."""

import json
import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets.arrow_writer import ArrowWriter

from fspad import FSPADConfig, FSPADModel
from helpers.models import make_target
from helpers.trainers import losses, make_dataset, make_trainer

BATCH_SIZE = 4  # of all processes together
# Of each four dialogues the first two have far more to count: one process of two does as well.
UNEVEN = [{"prompt_ids": [1, 2, 3], "response_ids": list(range(2 + (38, 31, 2, 1)[row % 4]))} for row in range(24)]
EQUAL = [{"prompt_ids": [row, 2], "response_ids": list(range(row, row + 9))} for row in range(24)]

STEPS = {"num_draft_steps": 2, "gradient_accumulation_steps": 2, "max_grad_value": 0.02}
# Name -> dialogues and arguments.
TRAININGS = {
    "plain": (UNEVEN, {}),
    "steps": (UNEVEN, STEPS),
    "checkpointed": (UNEVEN, {"num_draft_steps": 3, "gradient_checkpointing": True}),
    # Each process averages over its own rows, which gives the average over all only if every dialogue has as many.
    "apart": (EQUAL, {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False}),
    "streamed": (UNEVEN, {"is_stream": True}),
    "sharded": (UNEVEN, {**STEPS, "fsdp": True}),
    "sharded_and_checkpointed": (UNEVEN, {"num_draft_steps": 3, "gradient_checkpointing": True, "fsdp": True}),
}


@contextmanager
def fsdp_on_cpu():
    """Let accelerate shard on a CPU, which torch can do: it takes FSDP for the choice among several GPUs."""
    original = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        if kwargs.get("fsdp_plugin") is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", init)
        yield


def train(name: str, folder: Path, num_processes: int) -> dict:
    """Train, evaluate on a number of dialogues that two processes cannot share, and save.

    Args:
        name: Of the training.
        folder: Where to save the head, in a folder of that name.
        num_processes: Processes that this is run in.

    Returns:
        What the training came to.
    """
    rows, arguments = TRAININGS[name]
    values = {"feature_noise": 0.0, "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.1}
    values |= {f"per_device_{part}_batch_size": BATCH_SIZE // num_processes for part in ("train", "eval")}
    values |= {"max_steps": 3, **arguments}
    is_stream, is_sharded = values.pop("is_stream", False), values.pop("fsdp", False) and num_processes > 1
    target = make_target()
    # DDP gives all processes the head of the first; FSDP takes a part from each.
    torch.manual_seed(1 if is_sharded else 1 + PartialState().process_index)
    head = FSPADModel.from_target(target, FSPADConfig.from_target(target.config, draft_vocab_size=60))
    dataset = datasets.Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if is_stream else dataset
    with fsdp_on_cpu():
        trainer = make_trainer(folder / name, target, dataset, head, make_dataset(7), fsdp=is_sharded, **values)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    return {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "losses": losses(trainer),
        "metrics": {key: value for key, value in metrics.items() if "loss" in key or "accuracy" in key},
    }


def prepare(folder: Path) -> int:
    """Prepare a dataset in a file, with one cache for all processes.

    Args:
        folder: Where the cache goes.

    Returns:
        The files that this process wrote.
    """
    dataset = datasets.load_dataset(
        "json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder)
    )
    written = Counter()
    original = ArrowWriter.finalize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ArrowWriter, "finalize", lambda *args, **kwargs: written.update("x") or original(*args, **kwargs)
        )
        trainer = make_trainer(folder, dataset=dataset)
    assert len(trainer.train_dataset) == len(UNEVEN)
    return written.total()


def refusals(folder: Path) -> list[str]:
    """What is refused in several processes only.

    Args:
        folder: An empty folder.

    Returns:
        The messages.
    """
    messages = []
    stream = datasets.Dataset.from_list(UNEVEN).to_iterable_dataset()
    fsdp = {"num_draft_steps": 2, "fsdp": True, "fsdp_config": {"activation_checkpointing": True}}
    for arguments in ({"eval_dataset": stream}, fsdp):
        with pytest.raises(ValueError, match="expected") as error, fsdp_on_cpu():
            make_trainer(folder, **arguments)
        messages.append(str(error.value))
    return messages


def main() -> None:
    """Do everything as one of two processes in the folder of `rows.jsonl`, and write there what it came to."""
    folder, rank = Path.cwd(), int(os.environ["RANK"])
    # They meet at a file: a port that is free now may be taken by another test
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    PartialState(cpu=True)
    results = {name: train(name, folder, num_processes=2) for name in TRAININGS}
    results |= {"written": prepare(folder), "refusals": refusals(folder / "refused")}
    (folder / f"results-{rank}.json").write_text(json.dumps(results))
