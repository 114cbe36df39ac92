"""What a training is going to do, told before its first step: on how much, how long, and with how much memory and disk."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import datasets
import psutil
import torch

if TYPE_CHECKING:
    from fspad import FSPADConfig

    from .trainer import FSPADTrainer

# What AdamW keeps for each weight: two averages in float32
_OPTIMIZER_BYTES = 8
# From so many times the head's own work on, the vocabulary is worth a word
_LARGE_VOCABULARY = 3.0
_SMALLER_VOCABULARY = 16_384


@dataclass(frozen=True)
class Trial:
    """What one batch took, which is not trained on.

    Args:
        tokens: Tokens of the batch, padding left out.
        feature_seconds: Time of the target's forward pass; 0 where features are there.
        step_seconds: Time of the head's forward and backward pass.
    """

    tokens: int
    feature_seconds: float
    step_seconds: float


def try_batch(trainer: FSPADTrainer) -> Trial:
    """Run one batch from all over the training dataset, without an update, so that what is wrong with it is said first.

    Args:
        trainer: The trainer, before training. Its weights and random state stay as they are.

    Returns:
        What it took, the second time: the first one warms up.

    Raises:
        ValueError: If a token is not in the vocabulary, or a feature of the target is NaN or infinite.
    """
    device = trainer.args.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        inputs = trainer._prepare_inputs(trainer.data_collator(_some_rows(trainer)))
        for _ in range(2):
            start = time.perf_counter()
            batch = trainer.make_rows(inputs, is_training=True)
            _wait_for(device)
            middle = time.perf_counter()
            with trainer.accelerator.autocast():
                loss, _ = trainer.sum_losses(trainer.model, batch)
            trainer.check_features(batch, inputs)
            loss.backward()
            _wait_for(device)
            end = time.perf_counter()
            trainer.model.zero_grad()
    feature_seconds = 0.0 if "features" in inputs else middle - start
    return Trial(int(inputs["attention_mask"].sum()), feature_seconds, end - middle)


def _some_rows(trainer: FSPADTrainer) -> list[dict]:
    dataset, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    if isinstance(dataset, datasets.IterableDataset):
        return list(islice(dataset, size))
    size = min(size, len(dataset))
    return [dataset[place * len(dataset) // size] for place in range(size)]


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def describe(trainer: FSPADTrainer, trial: Trial) -> str:
    """Tell what is going to be trained.

    Args:
        trainer: The trainer.
        trial: What one batch took.

    Returns:
        A few lines of text.
    """
    is_stream = isinstance(trainer.train_dataset, datasets.IterableDataset)
    tokens = None if is_stream else sum(trainer.train_dataset["length"][:])
    weights = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    lines = (
        _describe_work(trainer, weights, tokens),
        _describe_features(trainer, trial, tokens),
        _describe_time_and_memory(trainer, trial, weights, tokens),
        _vocabulary_hint(trainer.model.config, weights),
    )
    return "\n".join(line for line in lines if line)


def _describe_work(trainer: FSPADTrainer, weights: int, tokens: int | None) -> str:
    args, config = trainer.args, trainer.model.config
    name = trainer.target.config._name_or_path or type(trainer.target).__name__
    scored = config.draft_vocab_size or config.vocab_size
    covered = "" if trainer.draft_coverage is None else f" ({trainer.draft_coverage:.1%} of what the assistant writes)"
    steps = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    rows = "a stream" if tokens is None else f"{len(trainer.train_dataset):,} rows of {tokens:,} tokens"
    return (
        f"Training {weights / 1e6:.1f} million weights of a head for {name}, which scores {scored:,} of "
        f"{config.vocab_size:,} tokens{covered}, on {rows}: {steps}, with batches of {trainer.batch_size} rows."
    )


def _describe_features(trainer: FSPADTrainer, trial: Trial, tokens: int | None) -> str | None:
    folder = trainer.args.features_dir
    if folder is None or tokens is None or not trial.feature_seconds:
        return None
    size = _size(tokens * trainer.model.config.hidden_size * trainer.target.dtype.itemsize)
    seconds = tokens * trial.feature_seconds / trial.tokens
    return f"Features that are not there yet are computed first: all take about {_duration(seconds)} and {size} in {folder}."


def _describe_time_and_memory(trainer: FSPADTrainer, trial: Trial, weights: int, tokens: int | None) -> str:
    args = trainer.args
    seconds = trial.step_seconds + (0.0 if args.features_dir is not None else trial.feature_seconds)
    speed = trial.tokens / seconds
    takes = f"a million tokens take about {_duration(1e6 / speed / args.world_size)}"
    if tokens is not None:
        takes = f"an epoch takes about {_duration(tokens / speed / args.world_size)}"
    memory = _size(_memory(trainer, weights))
    return (
        f"At {speed:,.0f} tokens/s (measured on one batch) {takes}. Memory: about {memory}; each checkpoint: "
        f"{_size(12 * weights)}."
    )


def _memory(trainer: FSPADTrainer, weights: int) -> float:
    device = trainer.args.device
    if device.type == "cpu":
        held = psutil.Process().memory_info().rss
    else:
        held = torch.accelerator.max_memory_allocated(device)
    return held + weights * _OPTIMIZER_BYTES


def _vocabulary_hint(config: FSPADConfig, weights: int) -> str | None:
    """Say what scoring all tokens costs, if that is much more than the head itself."""

    def work(size: int) -> float:
        # Products with each weight of the head (forward, and two backward); logits of draft and target, and a gradient
        return 3 * weights + 3 * config.hidden_size * size

    scored = config.draft_vocab_size or config.vocab_size
    times = work(scored) / work(_SMALLER_VOCABULARY)
    if scored <= _SMALLER_VOCABULARY or times < _LARGE_VOCABULARY:
        return None
    return (
        f"Scoring {scored:,} tokens makes a step {times:.0f} times as much work as {_SMALLER_VOCABULARY:,} of them "
        f"would, and drafting slower too: --draft-vocab-size {_SMALLER_VOCABULARY}."
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"
