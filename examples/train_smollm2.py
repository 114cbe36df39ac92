"""Train the FSPAD head of SmolLM2-135M-Instruct that `fspad demo` shows, on answers that SmolLM2 wrote itself.

    python examples/train_smollm2.py --output_dir smollm2-head --prompts prompts.jsonl --cache_features

Prompts are JSON lines with a `prompt`; dialogues (`--dialogs`, any number of files, .gz or not) have `messages`,
`prompt_ids` and `response_ids`. Prompts without an answer are answered first, into `dialogs.jsonl` of the output folder. All of
[`FSPADTrainingArguments`] can be given too. Interrupted? The same command with `--resume`.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

from fspad import FSPADConfig, FSPADModel
from fspad.cli.smollm2 import load_smollm2
from fspad.trainer import FSPADTrainer, FSPADTrainingArguments
from fspad.trainer.data import count_token_frequencies, most_frequent_tokens, prepare_dataset
from fspad.trainer.features import add_features
from fspad.trainer.synthesize import synthesize


@dataclass
class ExampleArguments:
    """What to train on, and what the head looks like."""

    prompts: list[str] = field(
        default_factory=list, metadata={"help": "JSONL files or Hub ids of datasets with a `prompt` column."}
    )
    dialogs: list[str] = field(
        default_factory=list, metadata={"help": "JSONL(.gz) files with `messages`, `prompt_ids`, `response_ids`."}
    )
    exclude: list[str] = field(
        default_factory=list,
        metadata={"help": "JSONL files whose `prompt` must not be trained on (held-out prompts)."},
    )
    cache_features: bool = field(default=False, metadata={"help": "Compute the target's features once, onto disk."})
    head: str | None = field(
        default=None, metadata={"help": "Folder of a head to continue from; by default a new one."}
    )
    feature_sampling: bool = field(default=True, metadata={"help": "Variant of a new head."})
    partial_alignment: bool = field(default=True, metadata={"help": "Variant of a new head."})
    draft_vocab_size: int = field(default=8192, metadata={"help": "Tokens a new head scores; 0 for all."})
    num_eval_dialogs: int = field(default=100, metadata={"help": "Dialogues kept out of training to evaluate on."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest synthesised answer."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in the output folder."})


@dataclass
class TrainingArguments(FSPADTrainingArguments):
    """The paper's training arguments, where a target of 135M and a few thousand dialogues want no others."""

    bf16: bool = field(default=True, metadata={"help": "Compute in bf16; the head's weights stay in fp32."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Larger than the paper's, as the head is smaller."})
    num_train_epochs: float = field(default=7, metadata={"help": "Passes over the dialogues."})
    warmup_steps: float = field(default=200, metadata={"help": "Shorter than the paper's, as the dataset is smaller."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Dialogues in a batch."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Dialogues in an evaluation batch."})
    train_sampling_strategy: str = field(default="group_by_length", metadata={"help": "Wastes little on padding."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})
    save_steps: float = field(default=250, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    report_to: str = field(default="none", metadata={"help": "Where to send the log to."})


def read_lines(path: str) -> list[dict]:
    """Read JSON lines."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def question(row: dict) -> str:
    """The user's first message of a dialogue, by which held-out prompts are told."""
    return next(message["content"] for message in row["messages"] if message["role"] == "user")


def load_dialogs(
    example: ExampleArguments, output_dir: Path, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Collect the dialogues that there are, and have the other prompts answered."""
    excluded = {row["prompt"] for path in example.exclude for row in read_lines(path)}
    rows = [row for path in example.dialogs for row in read_lines(path)]
    answered = {question(row) for row in rows}
    prompts = []
    for source in example.prompts:
        is_file = Path(source).is_file()
        prompts += [row["prompt"] for row in (read_lines(source) if is_file else load_dataset(source, split="train"))]
    prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt not in answered | excluded]
    if prompts:
        answers = output_dir / "dialogs.jsonl"
        synthesize(target, tokenizer, prompts, answers, max_new_tokens=example.max_new_tokens)
        rows += read_lines(str(answers))
    rows = [row for row in rows if question(row) not in excluded]
    return Dataset.from_list([{name: row[name] for name in ("prompt_ids", "response_ids")} for row in rows])


def make_head(
    example: ExampleArguments, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset
) -> FSPADModel:
    """Load the head to continue from, or make one that scores the tokens which the target writes most often."""
    if example.head is not None:
        return FSPADModel.from_pretrained(example.head, dtype=torch.float32)
    config = FSPADConfig.from_target(
        target.config,
        feature_sampling=example.feature_sampling,
        partial_alignment=example.partial_alignment,
        # A tree of the size that paid best on a CPU with two cores
        draft_depth=4,
        num_draft_tokens=15,
    )
    head = FSPADModel.from_target(target, config)
    if example.draft_vocab_size:
        counts = count_token_frequencies(dataset, target.config.vocab_size)
        ids = most_frequent_tokens(counts, example.draft_vocab_size, tokenizer.all_special_ids)
        print(f"draft vocabulary: {len(ids)} tokens, {counts[ids].sum() / counts.sum():.2%} of what the target writes")
        head.set_draft_vocabulary(ids)
    return head.float()


def main() -> None:
    """Train and save the head."""
    example, args = HfArgumentParser((ExampleArguments, TrainingArguments)).parse_args_into_dataclasses()
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    target, tokenizer = load_smollm2(torch.bfloat16)
    dataset = prepare_dataset(load_dialogs(example, output_dir, target, tokenizer), tokenizer, args.max_length)
    head = make_head(example, target, tokenizer, dataset)
    if example.cache_features:
        dataset = add_features(dataset, target, output_dir)
    splits = {"train": dataset, "test": None}
    if example.num_eval_dialogs:
        splits = dataset.train_test_split(example.num_eval_dialogs, seed=0)
    trainer = FSPADTrainer(
        model=head,
        target=target,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=True if example.resume else None)
    trainer.model.to(target.dtype)
    trainer.save_model()


if __name__ == "__main__":
    main()
