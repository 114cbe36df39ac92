"""Train the FSPAD head of SmolLM2-135M-Instruct that `fspad demo` shows, on answers that SmolLM2 wrote itself.

    python examples/train_smollm2.py --output_dir smollm2-head --prompts prompts.jsonl --cache_features

Prompts are JSON lines with a `prompt`; dialogues (`--dialogs`, any number of files, .gz or not, or Parquet) have `messages`,
`prompt_ids` and `response_ids`. Prompts without an answer are answered first, into `dialogs.jsonl` of the output folder. All of
[`FSPADTrainingArguments`] can be given too. Interrupted? The same command with `--resume`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

from fspad.bench.smollm2 import load_smollm2
from fspad.cli.synthesize import load_prompts
from fspad.cli.train import (
    HeadArguments,
    load_dialogues,
    make_head,
    trim_vocabulary,
    with_features,
)
from fspad.trainer import FSPADTrainer, FSPADTrainingArguments
from fspad.trainer.checks import find_checkpoint
from fspad.trainer.data import prepare_dataset
from fspad.trainer.synthesize import synthesize


@dataclass
class ExampleArguments:
    """What to train on, and what the head looks like."""

    prompts: list[str] = field(
        default_factory=list, metadata={"help": "JSONL(.gz) files or Hub ids of datasets with a `prompt` column."}
    )
    dialogs: list[str] = field(
        default_factory=list,
        metadata={"help": "JSONL(.gz) or Parquet files with `messages`, `prompt_ids`, `response_ids`."},
    )
    exclude: list[str] = field(
        default_factory=list,
        metadata={"help": "Files whose `prompt` must not be trained on (held-out prompts)."},
    )
    cache_features: bool = field(
        default=False, metadata={"help": "Compute the target's features once, into `features` of the output folder."}
    )
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
    use_cpu: bool = field(
        default=not torch.accelerator.is_available(),
        metadata={"help": "Do not use an accelerator, which bf16 expects."},
    )
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


def question(messages: list[dict]) -> str:
    """The user's first message of a dialogue, by which held-out prompts are told."""
    return next(message["content"] for message in messages if message["role"] == "user")


def collect_dialogues(
    example: ExampleArguments, answers: Path, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Collect the dialogues that there are, and have the other prompts answered."""
    held_out = {prompt.strip() for prompt in load_prompts(example.exclude)}
    files = [load_dialogues(path) for path in example.dialogs]
    answered = {question(messages) for dialogues in files for messages in dialogues["messages"]}
    prompts = [
        prompt for prompt in load_prompts(example.prompts) if prompt not in answered and prompt.strip() not in held_out
    ]
    if prompts:
        synthesize(target, tokenizer, prompts, answers, max_new_tokens=example.max_new_tokens)
        files.append(load_dialogues(str(answers)))
    if not files:
        raise ValueError("expected --prompts or --dialogs, got neither")
    columns = ["messages", "prompt_ids", "response_ids"]
    dialogues = concatenate_datasets([file.select_columns(columns) for file in files])
    kept = dialogues.filter(lambda messages: question(messages).strip() not in held_out, input_columns="messages")
    return kept.select_columns(["prompt_ids", "response_ids"])


def main() -> None:
    """Train and save the head."""
    example, args = HfArgumentParser((ExampleArguments, TrainingArguments)).parse_args_into_dataclasses()
    checkpoint = find_checkpoint(args.output_dir, example.resume or args.resume_from_checkpoint)
    output_dir = Path(args.output_dir)
    torch.manual_seed(args.seed)
    target, tokenizer = load_smollm2(torch.bfloat16)
    dataset = collect_dialogues(example, output_dir / "dialogs.jsonl", target, tokenizer)
    dataset = prepare_dataset(dataset, tokenizer, args.max_length)
    variant = {"feature_sampling": example.feature_sampling, "partial_alignment": example.partial_alignment}
    head = make_head(HeadArguments(head=example.head, **variant), target)
    if example.head is None:
        head.config.draft_depth = 4
        if example.draft_vocab_size:
            dataset = trim_vocabulary(head, dataset, tokenizer, args, example.draft_vocab_size)
    if example.cache_features:
        dataset = with_features(dataset, target, tokenizer, args, output_dir, "features")
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
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.model.to(target.dtype)
    trainer.save_model()


if __name__ == "__main__":
    main()
