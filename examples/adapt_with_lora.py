"""Adapt the FSPAD head of SmolLM2-135M-Instruct with LoRA: to a domain, or to a fine-tuned SmolLM2.

    python examples/adapt_with_lora.py --output_dir smollm2-lora --dialogs dialogs.jsonl.gz

The dialogues are JSON lines (.gz or not) with `prompt_ids` and `response_ids`, or `messages`; best are answers that the
target itself wrote, with the fine-tune that `--adapter` names if there is one. Needs peft. The output folder gets the
adapter, and in `merged` a head that needs no PEFT. All of [`FSPADTrainingArguments`] can be given too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import HfArgumentParser, PreTrainedModel

from fspad import FSPADModel
from fspad.bench.machine import native_dtype
from fspad.bench.measuring import Comparison, measure
from fspad.bench.smollm2 import load_smollm2
from fspad.trainer import FSPADTrainer, FSPADTrainingArguments
from fspad.trainer.data import prepare_dataset
from fspad.trainer.dialogues import load_dialogues

SHIPPED_HEAD = Path(__file__).parent / "heads" / "smollm2-135m-instruct"


@dataclass
class ExampleArguments:
    """What to adapt to what."""

    dialogs: str = field(metadata={"help": "JSONL(.gz) file of the domain's dialogues."})
    adapter: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a LoRA fine-tune of SmolLM2; by default SmolLM2 as it is."},
    )
    head: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the head; by default the shipped one."}
    )
    lora_r: int = field(default=32, metadata={"help": "Rank of the head's adapter."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale of the head's adapter: alpha / r."})
    eval_prompts: int = field(default=8, metadata={"help": "Prompts kept out of training, on which tau is measured."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer while tau is measured."})


@dataclass
class TrainingArguments(FSPADTrainingArguments):
    """Training arguments for an adapter and a few thousand dialogues."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Larger than for all weights, as usual for LoRA."})
    num_train_epochs: float = field(default=3, metadata={"help": "Passes over the dialogues."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Dialogues in a batch."})
    train_sampling_strategy: str = field(default="group_by_length", metadata={"help": "Wastes little on padding."})
    report_to: str = field(default="none", metadata={"help": "Where to send the log to."})


def prompt_of(input_ids: list[int], assistant_mask: list[int]) -> tuple[int, ...]:
    """The tokens before the first answer."""
    return tuple(input_ids[: assistant_mask.index(1)])


def hold_out(dataset: Dataset, num_prompts: int) -> tuple[Dataset, list[tuple[int, ...]]]:
    """Keep prompts out of a prepared dataset, with all of their answers."""
    columns = ["input_ids", "assistant_mask"]
    shuffled = dataset.select_columns(columns).shuffle(seed=0)
    prompts = list(dict.fromkeys(prompt_of(**row) for row in shuffled))[:num_prompts]
    held_out = set(prompts)
    return dataset.filter(lambda *row: prompt_of(*row) not in held_out, input_columns=columns), prompts


def measure_tau(
    target: PreTrainedModel | PeftModel,
    head: PreTrainedModel | PeftModel,
    prompts: list[tuple[int, ...]],
    max_new_tokens: int,
) -> float:
    """Mean tokens per verification step of greedy answers."""
    inputs = [torch.tensor([prompt], device=target.device) for prompt in prompts]
    answers = [
        measure(target, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, head, max_new_tokens)
        for ids in inputs
    ]
    return Comparison(plain=[], assisted=answers).tau


def main() -> None:
    """Measure, adapt, measure again, and save."""
    example, args = HfArgumentParser((ExampleArguments, TrainingArguments)).parse_args_into_dataclasses()
    torch.manual_seed(args.seed)
    target, tokenizer = load_smollm2(native_dtype(args.device))
    if example.adapter is not None:
        target = PeftModel.from_pretrained(target, example.adapter)
    target = target.to(args.device)
    # In the target's dtype: the head's own weights are frozen, and PEFT keeps those of the adapter in float32.
    head = FSPADModel.from_pretrained(example.head or SHIPPED_HEAD, dtype=target.dtype).to(args.device)
    dataset = prepare_dataset(load_dialogues(example.dialogs), tokenizer, args.max_length)
    dataset, prompts = hold_out(dataset, example.eval_prompts)
    before = measure_tau(target, head, prompts, example.max_new_tokens)
    trainer = FSPADTrainer(
        model=head,
        target=target,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=example.lora_r, lora_alpha=example.lora_alpha, target_modules="all-linear"),
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    adapted = trainer.model.eval()
    after = measure_tau(target, adapted, prompts, example.max_new_tokens)
    print(f"tau on {len(prompts)} held-out prompts: {before:.2f} before, {after:.2f} after")
    trainer.save_model()
    adapted.merge_and_unload().save_pretrained(Path(args.output_dir, "merged"))


if __name__ == "__main__":
    main()
