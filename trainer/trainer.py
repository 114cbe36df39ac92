"""Trains an FSPAD head on the features of its target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import CONFIG_NAME, logging

from fspad.provenance import check_vocabulary, note_default_revision, record_target
from fspad.target import LMHead, check_target, embed_tokens

from .adapters import check_adapter, check_virtual_tokens
from .checkpoints import find_checkpoint
from .data import DataCollatorForFSPAD, prepare_dataset
from .decoding import Prompt, decode_prompts, find_prompts, first_prompts
from .distributed import check_fsdp, check_streams
from .features import check_finite, compute_features
from .loss import AlignedBatch, align, counted_rows, dialogue_lengths, feature_loss, logits_loss
from .pushing import PushingMixin
from .training_arguments import FSPADTrainingArguments
from .unrolling import step_masks, unroll

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState
    from transformers.trainer_utils import EvalLoopOutput, TrainOutput

    from fspad import FSPADModel


logger = logging.get_logger(__name__)

# Columns of the sums over rows: feature loss, logits loss, correct rows, rows, rows correct in the top k.
_ROWS = 3
_NUM_COLUMNS = 5


class ClipGradientValues(TrainerCallback):
    """Clips gradients by value, once they are reduced over devices.

    Args:
        accelerator: The trainer's, to undo the loss scaling of fp16 first, which the trainer leaves to norm clipping.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def on_pre_optimizer_step(
        self,
        args: FSPADTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Clip right before the optimizer looks at the gradients."""
        if args.max_grad_value is not None:
            if args.max_grad_norm <= 0:
                self.accelerator.unscale_gradients()
            # Not the accelerator's method of that name, which raises under FSDP.
            nn.utils.clip_grad_value_(model.parameters(), args.max_grad_value)


class FSPADTrainer(PushingMixin, Trainer):
    """Trainer of an FSPAD head. The target runs beside it, is never changed, and never saved.

    Checkpoints, resuming, mixed precision, distribution and progress are those of [`~transformers.Trainer`]. The log
    lines have `feature_loss`, `logits_loss` and `accuracy` (share of rows whose most probable token, of those that the
    head scores, is the target's) beside the loss, all as sums over counted rows divided by their number. With more than
    one draft step, `accuracy_depth_2` and so on tell the same of the steps that feed on the head's own features.

    Evaluation always goes as deep as the head's drafts. It adds `accuracy_top_8` (or whatever `config.draft_top_k` is):
    the share of rows whose most probable token is among so many of the head. And it decodes the first prompts of the
    evaluation dataset, greedily, with and without the head as it will be used, which gives `tau` and `speedup`;
    `metric_for_best_model="tau"` keeps the checkpoint that drafts best. Training goes on as if nothing was evaluated.

    Args:
        model: The head. Keep its weights in fp32 and use `bf16=True`: updates get lost in bf16 weights. Of a head that
            PEFT wraps, only the adapter is trained and saved.
        target: The target, or its Hub id or path. Adapters of its weights, as LoRA's, are part of it while they are
            active.
        args: Training arguments.
        train_dataset: Dialogues in any form that [`~fspad.trainer.data.prepare_dataset`] accepts. Rows with a
            `features` column, as [`~fspad.trainer.features.add_features`] gives them, need no forward pass of the target.
            Of a stream `max_steps` are trained.
        eval_dataset: Dialogues to evaluate on, or a dict of such datasets.
        processing_class: The target's tokenizer, for datasets with `messages`. It is not kept: a trainer saves its
            tokenizer beside the model and gives the model its special tokens, and both are the target's. A hash of its
            vocabulary is recorded in the head's configuration.
        data_collator: By default a [`DataCollatorForFSPAD`].
        peft_config: The adapter to wrap the head with, e.g. `LoraConfig(target_modules="all-linear")`; by default none.
        **kwargs: As in [`~transformers.Trainer`].

    Raises:
        ValueError: If the head does not fit the target or the tokenizer, the target has virtual tokens, the adapter is
            made for a task, a dataset has nothing to train on, or several processes cannot do what is asked of them.
    """

    def __init__(
        self,
        model: FSPADModel | PeftModel,
        target: PreTrainedModel | str,
        args: FSPADTrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if args is None:
            args = FSPADTrainingArguments(output_dir="fspad-head")
        if isinstance(target, str):
            target = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
            note_default_revision(target.config)
        check_target(model.config, target)
        if processing_class is not None:
            check_vocabulary(model.config, processing_class)
        check_virtual_tokens(target)
        if (adapter := peft_config or getattr(model, "active_peft_config", None)) is not None:
            check_adapter(adapter)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if getattr(target, "hf_device_map", None) is None:
            target = target.to(args.device)
        self.target = target.eval()

        def prepare(dataset: Dataset) -> Dataset:
            return prepare_dataset(dataset, processing_class, args.max_length, args.packing)

        with args.main_process_first(desc="preparing the datasets"):
            if train_dataset is not None:
                train_dataset = prepare(train_dataset)
            if isinstance(eval_dataset, dict):
                eval_dataset = {name: prepare(dataset) for name, dataset in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = prepare(eval_dataset)

        eval_datasets = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        check_streams(args, train_dataset, eval_datasets)
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
        self.add_callback(ClipGradientValues(self.accelerator))
        # `compute_loss` divides by the rows of the whole step. The first name is read from 5.19 on, the other before.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._lm_head: LMHead | None = None
        self._train_sums = self._zero_sums(args.num_draft_steps)
        # Evaluation goes as deep as drafts do.
        self._eval_sums = self._zero_sums(max(args.num_draft_steps, model.config.draft_depth + 1))
        # Of each batch of the running evaluation, until there are enough.
        self._eval_prompts: list[list[Prompt]] = []

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train the head.

        Args:
            resume_from_checkpoint: Folder of a checkpoint, or `True` for the last whole one in `output_dir`.
            kwargs: As [`~transformers.Trainer.train`] takes them.

        Returns:
            Steps, loss and metrics.

        Raises:
            ValueError: If there is no such checkpoint, or it is not whole.
        """
        return super().train(find_checkpoint(self.args.output_dir, resume_from_checkpoint), **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a batch: its sums over counted rows, divided by the counted rows of the whole optimizer step.

        Args:
            model: The head, as wrapped for training.
            inputs: A batch of the data collator.
            return_outputs: Whether to return the sums too.
            num_items_in_batch: Counted rows of all batches of this optimizer step; by default those of this batch.

        Returns:
            The loss, and with `return_outputs` a dict with the summed losses, correct rows and counted rows.

        Raises:
            ValueError: If a feature of the target is NaN or infinite.
        """
        batch = self._make_rows(inputs, is_training=model.training)
        loss, sums = self._sum_losses(model, batch)
        # Only now: choosing the counted rows has waited for the features anyway. A gradient would not survive them.
        self._check_features(batch, inputs)
        if model.training:
            self._train_sums += sums
        rows = sums[: self.args.num_draft_steps, _ROWS].sum()
        num_items = rows if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=rows.device)
        loss = loss / num_items.clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over processes, but the rows were counted over all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, {"sums": sums}) if return_outputs else loss

    def _sum_losses(self, model: nn.Module, batch: AlignedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted loss summed over the counted rows of all trained steps, and for each step what to log."""
        num_steps = len(self._train_sums if model.training else self._eval_sums)
        embeds = self._embed(batch.next_token_ids).to(batch.features.dtype)
        # Rows are causal and padded on the right, so no counted row can see padding and no mask is needed.
        outputs = unroll(model, batch.features, embeds, num_steps, batch.position_ids)
        loss, sums = 0.0, []
        for step, (output, row_mask) in enumerate(zip(outputs, step_masks(batch.row_mask, num_steps), strict=True)):
            labels = batch.label_features[row_mask]
            sum_feature_loss = feature_loss(output.regress[row_mask], labels)
            top_k = self.model.config.draft_top_k if step == 0 and not model.training else 1
            sum_logits_loss, correct, in_top_k = logits_loss(
                output.predict[row_mask], labels, self._get_lm_head(), self.args.logits_chunk_size, top_k
            )
            if step < self.args.num_draft_steps:
                loss = loss + self.args.feature_loss_weight * sum_feature_loss
                loss = loss + self.args.logits_loss_weight * sum_logits_loss
            parts = (sum_feature_loss, sum_logits_loss, correct, row_mask.sum(), in_top_k)
            sums.append(torch.stack([value.detach().float() for value in parts]))
        return loss, torch.stack(sums)

    def _make_rows(self, inputs: dict[str, torch.Tensor], is_training: bool) -> AlignedBatch:
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

    def _check_features(self, batch: AlignedBatch, inputs: dict[str, torch.Tensor]) -> None:
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
        masks = [counted_rows(batch["assistant_mask"]) for batch in batch_samples]
        rows = sum(step_masks(mask, self.args.num_draft_steps).sum() for mask in masks).to(device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            rows = self.accelerator.gather(rows).sum()
        return rows

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Evaluate one batch.

        Args:
            model: The head.
            inputs: A batch of the data collator.
            prediction_loss_only: Without effect: logits over the vocabulary are never kept.
            ignore_keys: Without effect.

        Returns:
            The loss, and twice `None` for logits and labels.
        """
        with torch.no_grad():
            inputs = self._mask_repeated_rows(self._prepare_inputs(inputs))
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        self._eval_sums += outputs["sums"]
        if len({prompt for batch in self._eval_prompts for prompt in batch}) < self.args.num_eval_prompts:
            self._eval_prompts.append(find_prompts(inputs))
        return loss, None, None

    def _mask_repeated_rows(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Let nothing count in the dialogues with which accelerate fills up the last batch of all processes."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        mask = inputs["assistant_mask"].clone()
        # The last batch of all processes begins with the remainder, and the first process has its first part.
        mask[max(0, state.remainder - self.accelerator.process_index * len(mask)) :] = 0
        return {**inputs, "assistant_mask": mask}

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate a whole dataset; every metric is a sum over rows divided by their number, or measured by decoding."""
        self._eval_sums.zero_()
        self._eval_prompts.clear()
        device = self.args.device
        # Data loaders and decoding draw numbers or seed them, which must not change the training that goes on afterwards.
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            metrics = self._averages(self._eval_sums, top_k=self.model.config.draft_top_k)
            metrics["loss"] = (
                self.args.feature_loss_weight * metrics["feature_loss"]
                + self.args.logits_loss_weight * metrics["logits_loss"]
            )
            if self.args.num_eval_prompts > 0:
                metrics |= self._decode_eval_prompts()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _decode_eval_prompts(self) -> dict[str, float]:
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            logger.warning_once(
                "tau is not measured during training: the head is sharded over processes, which decode different prompts. "
                "Measure it with the saved head, and set `num_eval_prompts=0`."
            )
            return {}
        prompts = first_prompts(self._eval_prompts, self.args.num_eval_prompts)
        return decode_prompts(self.model, self.target, prompts, self.args.eval_max_new_tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and add the parts of the training loss since the last log line.

        Args:
            logs: The values to log.
            start_time: When training started.
        """
        if "loss" in logs:
            logs.update(self._averages(self._train_sums))
            self._train_sums.zero_()
        super().log(logs, start_time)

    def _zero_sums(self, num_steps: int) -> torch.Tensor:
        return torch.zeros(num_steps, _NUM_COLUMNS, device=self.args.device)

    def _averages(self, sums: torch.Tensor, top_k: int = 1) -> dict[str, float]:
        """Averages over the rows of the trained steps, and of each step the accuracy, of the first in the top k too."""
        sums = self.accelerator.reduce(sums.clone(), "sum").cpu()
        sum_feature_loss, sum_logits_loss, _, rows, _ = sums[: self.args.num_draft_steps].sum(dim=0).tolist()
        metrics = {"feature_loss": sum_feature_loss / max(1.0, rows), "logits_loss": sum_logits_loss / max(1.0, rows)}
        for step, (_, _, correct, step_rows, in_top_k) in enumerate(sums.tolist(), start=1):
            metrics["accuracy" if step == 1 else f"accuracy_depth_{step}"] = correct / max(1.0, step_rows)
            if step == 1 and top_k > 1:
                metrics[f"accuracy_top_{top_k}"] = in_top_k / max(1.0, step_rows)
        return metrics

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [
            "input_ids",
            "attention_mask",
            "assistant_mask",
            "position_ids",
            "features",
            "length",
        ]
