"""`fspad train`: command line of `FSPADTrainer`."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import torch
import typer
import yaml
from transformers import HfArgumentParser, set_seed

from fspad import FSPADConfig, FSPADModel
from fspad.provenance import check_vocabulary

from .loading import load_head, load_target

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fspad.trainer import FSPADTrainer, FSPADTrainingArguments


# So many rows of a stream tell which tokens are frequent.
_COUNTED_ROWS = 10_000


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
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training dialogues while they are trained on, --max_steps of them in batches."},
    )
    features_dir: str | None = field(
        default=None,
        metadata={"help": "Folder to compute the target's features into, once, or to use them again from."},
    )
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
        OSError: If a file is missing or cannot be written.
        ValueError: If arguments contradict each other, or do not fit target or dataset, a file cannot be read, or the
            head was trained with another vocabulary.
    """
    missing = [name for name in ("accelerate", "datasets", "evaluate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'training needs {" and ".join(missing)}: `pip install "fspad[train]"`')
    from fspad.trainer import FSPADTrainer, FSPADTrainingArguments
    from fspad.trainer.checkpoints import find_checkpoint

    parser = HfArgumentParser(
        (HeadArguments, FSPADTrainingArguments),
        prog="fspad train",
        usage="fspad train [CONFIG.yaml] [--name value ...]",
        description="CONFIG.yaml may hold any of the arguments; what is given on the command line overrules it.",
    )
    options, training = parser.parse_args_into_dataclasses(read_config(parser, arguments))
    check_streaming(options, training)
    training.resume_from_checkpoint = find_checkpoint(training.output_dir, training.resume_from_checkpoint)
    train_dataset = load_train_dataset(options, training.seed)
    eval_dataset = load_dialogues(options.eval_file) if options.eval_file else None
    target, tokenizer = load_target(options.target)
    # A new head is the same one in every run, and in every process, of each of which FSDP takes a part.
    set_seed(training.seed)
    head = make_head(options, target)
    check_vocabulary(head.config, tokenizer)
    if options.draft_vocab_size is not None:
        train_dataset = trim_vocabulary(head, train_dataset, tokenizer, training, options.draft_vocab_size)
    if options.features_dir is not None:
        arguments = (target, tokenizer, training, Path(options.features_dir))
        train_dataset = with_features(train_dataset, *arguments, "train")
        eval_dataset = eval_dataset and with_features(eval_dataset, *arguments, "eval")
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
    if training.push_to_hub:
        trainer.push_to_hub()  # saves first
    else:
        trainer.save_model()


def check_streaming(options: HeadArguments, training: FSPADTrainingArguments) -> None:
    """Check that what is asked for can be done with a stream, if it is one.

    Args:
        options: With `streaming` or not.
        training: Training arguments.

    Raises:
        ValueError: If it cannot.
    """
    if not options.streaming:
        return
    if training.max_steps <= 0:
        raise ValueError("expected --max_steps N with --streaming, since a stream does not tell its length, got none")
    if options.features_dir is not None or training.packing:
        got = "--packing" if training.packing else "--features_dir"
        raise ValueError(f"expected all dialogues at once for {got}, got --streaming: leave out one of the two")


def load_train_dataset(options: HeadArguments, seed: int = 42) -> Dataset | IterableDataset:
    """Load the training dialogues.

    Args:
        options: With either `train_file` or `dataset`.
        seed: Seed of the order in which a stream is read, a thousand rows at a time.

    Returns:
        The dataset.

    Raises:
        OSError: If there is no such file or dataset.
        ValueError: If there is neither or both, or it cannot be read.
    """
    if (options.train_file is None) == (options.dataset is None):
        got = "neither" if options.dataset is None else "both"
        raise ValueError(f"expected --train_file FILE or --dataset HUB_ID, got {got}")
    if options.train_file is not None:
        dataset = load_dialogues(options.train_file, options.streaming)
    else:
        dataset = _load_dataset(options.dataset, options.dataset, options.streaming, split=options.dataset_split)
    return dataset.shuffle(seed=seed) if options.streaming else dataset


def load_dialogues(path: str, streaming: bool = False) -> Dataset | IterableDataset:
    """Load a file of dialogues.

    Args:
        path: JSON-lines file, maybe gzipped, or Parquet file.
        streaming: Whether to read it only while it is gone through.

    Returns:
        The dataset.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
    """
    from fspad.trainer.dialogue_files import check_rows

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if not Path(path).stat().st_size:
        raise ValueError(f"expected dialogues in {path}, got an empty file")
    builder = "parquet" if path.endswith(".parquet") else "json"
    if builder == "json":
        check_rows(Path(path))
    return _load_dataset(path, builder, streaming, data_files=path, split="train")


def _load_dataset(source: str, builder: str, streaming: bool, **kwargs: str) -> Dataset | IterableDataset:
    import datasets

    verbosity = datasets.logging.get_verbosity()
    # What it logs of a file that cannot be read is said again by its error.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        dataset = datasets.load_dataset(builder, streaming=streaming, **kwargs)
        # Streams read nothing before, and texts are decoded only now.
        next(iter(dataset), None)
        return dataset
    except Exception as error:
        # Anything: each format has errors of its own, and datasets wraps some of them.
        reason = (isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__) or error
        if isinstance(reason, OSError) and not isinstance(reason, gzip.BadGzipFile):
            raise reason from None  # e.g. no permission, no network, no room for the cache: it says so itself
        raise ValueError(
            f"expected dialogues in JSON lines (.gz or not) or Parquet, got {source}, which cannot be read: "
            f"{shorten(str(reason), 300)}"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


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
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    training: FSPADTrainingArguments,
    size: int,
) -> Dataset | IterableDataset:
    """Let the head score the tokens that the assistant writes most often in a dataset, or first in a stream.

    Args:
        head: The head, changed in place.
        dataset: The training dialogues.
        tokenizer: The target's tokenizer; its special tokens are always in.
        training: Training arguments.
        size: How many tokens.

    Returns:
        The dataset, prepared for the trainer.
    """
    from datasets import IterableDataset

    from fspad.trainer.data import count_token_frequencies, most_frequent_tokens, prepare_dataset

    with training.main_process_first(desc="preparing the dataset"):
        prepared = prepare_dataset(dataset, tokenizer, training.max_length)
    is_stream = isinstance(prepared, IterableDataset)
    counts = count_token_frequencies(prepared, head.config.vocab_size, _COUNTED_ROWS if is_stream else None)
    ids = most_frequent_tokens(counts, size, tokenizer.all_special_ids)
    typer.echo(
        f"Draft vocabulary: {len(ids)} tokens, {counts[ids].sum() / counts.sum():.2%} of what the target writes."
    )
    head.set_draft_vocabulary(ids)
    return prepared


def with_features(
    dataset: Dataset,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: FSPADTrainingArguments,
    folder: Path,
    name: str,
) -> Dataset:
    """Compute the features of a dataset onto disk, or take those that are there.

    Args:
        dataset: The dialogues.
        target: The target.
        tokenizer: Its tokenizer.
        training: Training arguments.
        folder: Folder of all features.
        name: Name of this dataset's folder in it.

    Returns:
        The dataset, prepared for the trainer, with features.
    """
    from fspad.trainer.data import prepare_dataset
    from fspad.trainer.features import add_features

    prepared = prepare_dataset(dataset, tokenizer, training.max_length, training.packing)
    return add_features(prepared, target.to(training.device), folder / name, training.per_device_train_batch_size)
