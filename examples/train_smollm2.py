"""Train the FSPAD head of SmolLM2-135M-Instruct that `fspad demo` shows, on answers that SmolLM2 wrote itself.

    python examples/train_smollm2.py --output_dir smollm2-head --prompts prompts.jsonl --features_dir features

Prompts are JSON lines with a `prompt`; dialogues (`--dialogs`, any number of files, .gz or not, or Parquet) have `messages`,
`prompt_ids` and `response_ids`. Prompts without an answer are answered first, into `dialogs.jsonl` of the output folder. All of
[`FSPADTrainingArguments`] can be given too. Interrupted? The same command with `--resume_from_checkpoint true`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

from fspad import FSPADConfig, FSPADModel
from fspad.bench.machine import native_dtype
from fspad.bench.questions import read_questions
from fspad.bench.smollm2 import load_smollm2
from fspad.trainer import FSPADTrainer, FSPADTrainingArguments
from fspad.trainer.dialogues import load_dialogues
from fspad.trainer.synthesize import synthesize


@dataclass
class ExampleArguments:
    """What to train on, and what the head looks like."""

    prompts: list[str] = field(default_factory=list, metadata={"help": "JSONL files of lines with a `prompt`."})
    dialogs: list[str] = field(
        default_factory=list,
        metadata={"help": "JSONL(.gz) or Parquet files with `messages`, `prompt_ids`, `response_ids`."},
    )
    exclude: list[str] = field(
        default_factory=list,
        metadata={"help": "Files whose `prompt` must not be trained on (held-out prompts)."},
    )
    head: str | None = field(
        default=None, metadata={"help": "Folder of a head to continue from; by default a new one."}
    )
    num_eval_dialogs: int = field(default=100, metadata={"help": "Dialogues kept out of training to evaluate on."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest synthesised answer."})


@dataclass
class TrainingArguments(FSPADTrainingArguments):
    """Training arguments for a target of 135M and a few thousand dialogues."""

    bf16: bool = field(default=True, metadata={"help": "Compute in bf16 where there is one; weights stay in fp32."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Larger than the default, as the head is small."})
    num_train_epochs: float = field(default=7, metadata={"help": "Passes over the dialogues."})
    draft_vocab_size: int | None = field(default=8192, metadata={"help": "Tokens that the head scores."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Dialogues in a batch."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Dialogues in an evaluation batch."})
    train_sampling_strategy: str = field(default="group_by_length", metadata={"help": "Wastes little on padding."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_steps: float = field(default=250, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    report_to: str = field(default="none", metadata={"help": "Where to send the log to."})


def read_prompts(files: list[str]) -> list[str]:
    """The prompts in some files, each once."""
    return list(dict.fromkeys(question.turns[0] for file in files for question in read_questions(Path(file))))


def first_message(messages: list[dict]) -> str:
    """The user's first message of a dialogue, by which held-out prompts are told."""
    return next(message["content"] for message in messages if message["role"] == "user")


def collect_dialogues(
    example: ExampleArguments, answers: Path, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Collect the dialogues that there are, and have the other prompts answered."""
    held_out = {prompt.strip() for prompt in read_prompts(example.exclude)}
    files = [load_dialogues(path) for path in example.dialogs]
    answered = {first_message(messages) for dialogues in files for messages in dialogues["messages"]}
    prompts = [
        prompt for prompt in read_prompts(example.prompts) if prompt not in answered and prompt.strip() not in held_out
    ]
    if prompts:
        synthesize(target, tokenizer, prompts, answers, max_new_tokens=example.max_new_tokens)
        files.append(load_dialogues(answers))
    if not files:
        raise ValueError("expected --prompts or --dialogs, got neither")
    columns = ["messages", "prompt_ids", "response_ids"]
    dialogues = concatenate_datasets([file.select_columns(columns) for file in files])
    kept = dialogues.filter(lambda messages: first_message(messages).strip() not in held_out, input_columns="messages")
    return kept.select_columns(["prompt_ids", "response_ids"])


def main() -> None:
    """Train and save the head."""
    example, args = HfArgumentParser((ExampleArguments, TrainingArguments)).parse_args_into_dataclasses()
    target, tokenizer = load_smollm2(native_dtype(args.device))
    dataset = collect_dialogues(example, Path(args.output_dir, "dialogs.jsonl"), target, tokenizer)
    splits = {"train": dataset, "test": None}
    if example.num_eval_dialogs:
        splits = dataset.train_test_split(example.num_eval_dialogs, seed=0)
    if example.head is None:
        torch.manual_seed(args.seed)
        head = FSPADModel.from_target(target, FSPADConfig.from_target(target.config, draft_depth=4)).float()
    else:
        head = FSPADModel.from_pretrained(example.head, dtype=torch.float32)
        args.draft_vocab_size = None  # its own
    trainer = FSPADTrainer(
        model=head,
        target=target,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.model.to(target.dtype)
    trainer.save_model()


if __name__ == "__main__":
    main()
