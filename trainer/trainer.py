"""Trains an FSPAD head on the features of its target."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import CONFIG_NAME

from fspad.provenance import check_vocabulary, record_target, warn_of_other_weights
from fspad.target import LMHead, check_target, embed_tokens

from .checks import (
    check_adapter,
    check_fsdp,
    check_output_dir,
    check_streams,
    check_virtual_tokens,
    find_checkpoint,
)
from .clipping import ClipGradientValues
from .data import DataCollatorForFSPAD, prepare_all
from .evaluation import EvaluationMixin
from .features import add_features, check_finite, compute_features
from .loading import load_target, load_tokenizer, make_head, trim_vocabulary, warn_of_another_tokenizer
from .loss import AlignedBatch, CountedRows, LossSums, align, compute_losses, counted_rows, dialogue_lengths
from .overview import describe, try_batch
from .pushing import PushingMixin
from .resumable import say_how_to_go_on
from .training_arguments import FSPADTrainingArguments
from .unrolling import step_masks, unroll

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset, IterableDataset
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedTokenizerBase
    from transformers.trainer_utils import TrainOutput

    from fspad import FSPADModel

    from .evaluation import Prompt


class FSPADTrainer(EvaluationMixin, PushingMixin, Trainer):
    """Trainer of an FSPAD head. The target runs beside it, is never changed, and never saved.

        FSPADTrainer(target="HuggingFaceTB/SmolLM2-135M-Instruct", train_dataset=dataset).train()

    Checkpoints, resuming, mixed precision, distribution and progress are those of [`~transformers.Trainer`]. The log
    lines have `feature_loss`, `logits_loss`, `accuracy` (share of rows whose most probable token, of those that the
    head scores, is the target's) and `tokens_per_second` beside the loss, averages over counted rows. With more than one
    draft step, `accuracy_depth_2` and so on tell the accuracy of the steps that feed on the head's own features.

    Evaluation always goes as deep as the head's drafts. It adds `accuracy_top_8` (or whatever `config.draft_top_k` is):
    the share of rows whose most probable token is among so many of the head. And it decodes the first prompts of the
    evaluation dataset, greedily, with and without the head as it will be used, which gives `tau`, `speedup` and
    `acceptance_depth_1` and so on; `metric_for_best_model="tau"` keeps the checkpoint that drafts best. Training goes on as
    if nothing was evaluated. Plain answers are decoded at the first evaluation and kept, so that `speedup` is a hint: the
    machine may have become faster or slower since then.

    Args:
        model: The head; by default a new one. Keep its weights in fp32 and use `bf16=True`: updates get lost in bf16
            weights. Of a head that PEFT wraps, only the adapter is trained and saved.
        target: The target, or its Hub id or path. Adapters of its weights, as LoRA's, are part of it while they are
            active.
        args: Training arguments.
        train_dataset: Dialogues in any form that [`~fspad.trainer.data.prepare_dataset`] accepts. Rows with a
            `features` column, as [`~fspad.trainer.features.add_features`] gives them, need no forward pass of the target.
            Of a stream `max_steps` are trained.
        eval_dataset: Dialogues to evaluate on, or a dict of such datasets.
        processing_class: The target's tokenizer, for datasets with `messages`; by default that of a target given by name.
            It is not kept: a trainer saves its tokenizer beside the model and gives the model its special tokens, and
            both are the target's. A hash of its vocabulary is recorded in the head's configuration.
        data_collator: By default a [`DataCollatorForFSPAD`].
        peft_config: The adapter to wrap the head with, e.g. `LoraConfig(target_modules="all-linear")`; by default none.
        **kwargs: As in [`~transformers.Trainer`].

    Raises:
        OSError: If nothing can be written to the output folder.
        ValueError: If there is no target, the head does not fit the target or the tokenizer, the target has virtual tokens,
            the adapter is made for a task, a dataset has nothing to train on, or several processes cannot do what is asked
            of them.
    """

    def __init__(
        self,
        model: FSPADModel | PeftModel | None = None,
        target: PreTrainedModel | str | None = None,
        args: FSPADTrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if target is None:
            raise ValueError("expected a target, the model whose drafts the head is to write, got None")
        if args is None:
            args = FSPADTrainingArguments(output_dir="fspad-head")
        check_output_dir(args.output_dir)
        if isinstance(target, str):
            processing_class = processing_class or load_tokenizer(target)
            target = load_target(target, args.device)
        check_virtual_tokens(target)
        model = make_head(target, args.seed) if model is None else model
        check_target(model.config, target)
        if processing_class is not None:
            check_vocabulary(model.config, processing_class)
            warn_of_another_tokenizer(target, processing_class)
        warn_of_other_weights(model.config, target)
        if (adapter := peft_config or getattr(model, "active_peft_config", None)) is not None:
            check_adapter(adapter)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if getattr(target, "hf_device_map", None) is None:
            target = target.to(args.device)
        self.target = target.eval()
        with args.main_process_first(desc="preparing the datasets"):
            train_dataset, eval_dataset = prepare_all(
                (train_dataset, eval_dataset), processing_class, args, model.config.vocab_size
            )
        check_streams(
            args, train_dataset, list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        )
        # Share of the assistant's tokens that the head scores, where that was counted
        self.draft_coverage: float | None = None
        if args.draft_vocab_size is not None and train_dataset is not None:
            self.draft_coverage = trim_vocabulary(model, train_dataset, processing_class, args.draft_vocab_size)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or DataCollatorForFSPAD(vocab_size=model.config.vocab_size),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        # The parent sets what is no field of a head: loading the saved one would warn of it
        vars(model.config).pop("use_cache", None)
        check_fsdp(self.accelerator, args.num_draft_steps)
        record_target(model.config, target, processing_class)
        if args.num_draft_tokens not in (None, "measure"):
            is_automatic = args.num_draft_tokens == "auto"
            model.config.num_draft_tokens = "auto" if is_automatic else int(args.num_draft_tokens)
        self.add_callback(ClipGradientValues(self.accelerator))
        # `compute_loss` divides by the rows of the whole step. The first name is read from 5.19 on, the other before.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._lm_head: LMHead | None = None
        self._train_sums = self._eval_sums = LossSums()
        # Since when the speed is counted, and for how long the training stood still since then
        self._log_start, self._paused = time.perf_counter(), 0.0
        # Of each batch of the running evaluation, until there are enough.
        self._eval_prompts: list[list[Prompt]] = []
        self._plain_answers: dict[Prompt, Any] = {}

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train the head.

        Before that one batch is tried, what is going to be trained is told, and with `features_dir` features are computed;
        afterwards the number of drafted tokens is chosen by measurement, if the arguments say so.

        Args:
            resume_from_checkpoint: Folder of a checkpoint, or `True` for the last whole one in `output_dir`.
            kwargs: As [`~transformers.Trainer.train`] takes them.

        Returns:
            Steps, loss and metrics.

        Raises:
            OSError: If a checkpoint cannot be written, e.g. to a full disk. Those before it are kept.
            ValueError: If there is no such checkpoint, or it is not whole; or if a batch cannot be trained on.
        """
        checkpoint = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        if self.train_dataset is not None and not is_deepspeed_zero3_enabled():
            self.tell(describe(self, try_batch(self)))
        self.compute_features()
        self._train_sums, self._log_start, self._paused = LossSums(), time.perf_counter(), 0.0
        output = super().train(checkpoint, **kwargs)
        if self.args.num_draft_tokens == "measure":
            self.measure_draft_size()
        return output

    def tell(self, text: str) -> None:
        """Print something on the first process, unless progress is turned off with `disable_tqdm`.

        Args:
            text: What to print.
        """
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            print(text, flush=True)

    @property
    def batch_size(self) -> int:
        """Rows of one optimizer step, over all devices."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def compute_features(self) -> None:
        """Compute the features of the datasets onto disk, if the arguments say so and they are not there."""
        if self.args.features_dir is None:
            return
        folder, size = Path(self.args.features_dir), self.args.per_device_train_batch_size

        def with_features(dataset: Dataset | None, name: str) -> Dataset | None:
            if dataset is None or "features" in dataset.column_names:
                return dataset
            return add_features(dataset, self.target, folder / name, size)

        self.train_dataset = with_features(self.train_dataset, "train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: with_features(dataset, f"eval-{name}") for name, dataset in self.eval_dataset.items()
            }
        else:
            self.eval_dataset = with_features(self.eval_dataset, "eval")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, LossSums]]:
        """Loss of a batch: its sums over counted rows, divided by the counted rows of the whole optimizer step.

        Args:
            model: The head, as wrapped for training.
            inputs: A batch of the data collator.
            return_outputs: Whether to return the sums too.
            num_items_in_batch: Counted rows of all batches of this optimizer step; by default those of this batch.

        Returns:
            The loss, and with `return_outputs` a dict with the [`~fspad.trainer.loss.LossSums`].

        Raises:
            ValueError: If a feature of the target is NaN or infinite.
        """
        batch = self.make_rows(inputs, is_training=model.training)
        loss, sums = self.sum_losses(model, batch)
        # Only now: choosing the counted rows has waited for the features anyway. A gradient would not survive them.
        self.check_features(batch, inputs)
        if model.training:
            sums.tokens = inputs["attention_mask"].sum()
            self._train_sums.add(sums)
        num_items = sums.rows[0] if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = loss / num_items.to(loss.device).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over processes, but the rows were counted over all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, {"sums": sums}) if return_outputs else loss

    def sum_losses(self, model: nn.Module, batch: AlignedBatch) -> tuple[torch.Tensor, LossSums]:
        """Sum up the losses of a batch; an evaluation goes as deep as drafts do.

        Args:
            model: The head, as wrapped for training.
            batch: Rows.

        Returns:
            The weighted loss summed over counted rows, a scalar; and for each step what to log.
        """
        num_steps = self.args.num_draft_steps
        if not model.training:
            num_steps = max(num_steps, self.model.config.draft_depth + 1)
        embeds = self._embed(batch.next_token_ids).to(batch.features.dtype)
        # Rows are causal and padded on the right, so no counted row can see padding and no mask is needed.
        outputs = list(unroll(model, batch.features, embeds, num_steps, batch.position_ids))
        rows = CountedRows.select(outputs, batch, step_masks(batch.row_mask, num_steps))
        top_k = 1 if model.training else self.model.config.draft_top_k
        return compute_losses(rows, self.args, self._get_lm_head(), top_k)

    def make_rows(self, inputs: dict[str, torch.Tensor], is_training: bool) -> AlignedBatch:
        """Turn a batch of the data collator into inputs and labels of the head.

        Args:
            inputs: The batch; without features the target is asked for them.
            is_training: Whether to add noise to the input features.

        Returns:
            The rows.
        """
        features, position_ids = inputs.get("features"), inputs.get("position_ids")
        if features is None:
            # Packed dialogues are told apart by their positions, which a padding mask would overrule.
            mask = inputs["attention_mask"] if position_ids is None else None
            features = compute_features(self.target, inputs["input_ids"], mask, position_ids)
        # The head may be wrapped in autocast; its own weights say what goes in.
        features = features.to(device=self.args.device, dtype=self.model.dtype)
        batch = align(inputs["input_ids"], features, inputs["assistant_mask"], position_ids)
        if is_training and self.args.feature_noise:
            # Labels stay clean.
            lengths = dialogue_lengths(inputs["attention_mask"], position_ids)[:, : batch.features.shape[1], None]
            noise = torch.rand(batch.features.shape, device=features.device) - 0.5
            batch.features = batch.features + (noise * (self.args.feature_noise * 512 / lengths)).to(features.dtype)
        return batch

    def check_features(self, batch: AlignedBatch, inputs: dict[str, torch.Tensor]) -> None:
        """Check that a batch can be trained on.

        Args:
            batch: Its rows.
            inputs: The batch of the data collator that they were made of, to name a row.

        Raises:
            ValueError: If a feature of the target is NaN or infinite.
        """
        is_finite = [torch.isfinite(part).all(dim=-1) for part in (batch.features, batch.label_features)]

        def name_row(row: int) -> str:
            ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
            return f"the row of {len(ids)} tokens that begins with the token ids {ids[:10]}"

        check_finite(is_finite[0] & is_finite[1], self.target, name_row)

    @torch.no_grad()
    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return embed_tokens(self.target, token_ids).to(self.args.device)

    def _get_lm_head(self) -> LMHead:
        """The target's LM head over the tokens that the head scores."""
        if self._lm_head is None:
            self._lm_head = LMHead(self.target, self.model.active_draft_vocab_ids)
        return self._lm_head

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        # A checkpoint of an adapter has no configuration of the head.
        if Path(resume_from_checkpoint, CONFIG_NAME).is_file():
            saved = type(self.model.config).from_pretrained(resume_from_checkpoint)
            for name in ("feature_sampling", "partial_alignment", "draft_vocab_size"):
                expected, got = getattr(saved, name), getattr(self.model.config, name)
                if expected != got:
                    raise ValueError(
                        f"expected a head with {name}={expected}, as in {resume_from_checkpoint}, got {name}={got}: "
                        "resume with the head that the training began with."
                    )
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        # The draft vocabulary is part of the checkpoint
        self._lm_head = None

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor | None:
        if not batch_samples:
            return None
        # Those of the first draft step, so that further ones do not dilute it
        rows = sum(counted_rows(batch["assistant_mask"]).sum() for batch in batch_samples).to(device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            rows = self.accelerator.gather(rows).sum()
        return rows

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, as [`~transformers.Trainer.evaluate`] does. Its time does not count in the speed of training."""
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._paused += time.perf_counter() - start
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and add the parts of the training loss and the speed since the last log line.

        Args:
            logs: The values to log.
            start_time: When training started.
        """
        if "loss" in logs:
            sums = self._train_sums.map(lambda value: self.accelerator.reduce(value.clone(), "sum").cpu())
            logs |= sums.averages(self.args.draft_step_weights) | {"loss": logs["loss"]}
            now = time.perf_counter()
            if sums.tokens is not None:
                logs["tokens_per_second"] = round(sums.tokens.item() / (now - self._log_start - self._paused), 1)
            self._train_sums, self._log_start, self._paused = LossSums(), now, 0.0
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with say_how_to_go_on(Path(self.args.output_dir), "give `resume_from_checkpoint`"):
            super()._save_checkpoint(*args, **kwargs)

    def _track_num_input_tokens(self, inputs: dict[str, torch.Tensor]) -> None:
        # The parent would count the values of the features, or nothing without them.
        if self.args.include_num_input_tokens_seen == "no":
            return
        tokens = inputs["attention_mask"]
        tokens = (
            tokens.sum()
            if self.args.include_num_input_tokens_seen == "non_padding"
            else tokens.new_tensor(tokens.numel())
        )
        self.state.num_input_tokens_seen += self.accelerator.gather(tokens.to(self.args.device)).sum().item()

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [
            "input_ids",
            "attention_mask",
            "assistant_mask",
            "position_ids",
            "features",
            "length",
        ]
