"""Evaluation: losses and accuracies, and what they stand for, speculative decoding of prompts that were not trained on."""

from __future__ import annotations

import copy
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather_object
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from fspad.bench import measuring
from fspad.bench.methods import REFERENCE_DRAFT_TOKENS
from fspad.position_limits import position_table_length
from fspad.target import device_of

from .loss import LossSums

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.trainer_utils import EvalLoopOutput

    from fspad import FSPADModel

logger = logging.get_logger(__name__)

# Of tokens; hashable, so that the distinct ones can be told.
Prompt = tuple[int, ...]
# Fixed sizes of drafts that are tried beside the automatic one
DRAFT_SIZES = (4, 8, 16, 32)
# A fixed size suits one machine, so that it must be faster by so much here to be saved
_WORTH_FIXING = 1.05


def find_prompts(batch: dict[str, torch.Tensor]) -> list[Prompt]:
    """Find what stands before the first answer of each dialogue.

    Args:
        batch: A batch of the data collator: `input_ids` and `assistant_mask` of shape `(batch, length)`, and the
            `position_ids` of the same shape if dialogues are packed.

    Returns:
        The prompts in the order of their dialogues. Padding has none.
    """
    input_ids, assistant_mask = batch["input_ids"].tolist(), batch["assistant_mask"].tolist()
    position_ids = batch.get("position_ids")
    positions = [range(len(ids)) for ids in input_ids] if position_ids is None else position_ids.tolist()
    prompts = []
    for ids, mask, places in zip(input_ids, assistant_mask, positions, strict=True):
        start = None
        for index, place in enumerate(places):
            if place == 0:
                start = index
            elif mask[index] and start is not None:
                prompts.append(tuple(ids[start:index]))
                start = None
    return prompts


def first_prompts(batches: list[list[Prompt]], num_prompts: int) -> list[Prompt]:
    """Choose the first distinct prompts of a dataset, the same ones however many processes share it.

    Args:
        batches: The prompts of each batch that this process saw. All processes must call this.
        num_prompts: How many to choose.

    Returns:
        At most `num_prompts` prompts, the same in every process.
    """
    of_processes = gather_object([batches])
    # Processes take batches in turn.
    in_order = [batch for turn in zip_longest(*of_processes, fillvalue=()) for batch in turn]
    return list(dict.fromkeys(prompt for batch in in_order for prompt in batch))[:num_prompts]


def as_deployed(head: FSPADModel | PeftModel, target: PreTrainedModel) -> FSPADModel | PeftModel:
    """Copy a head as it will be used: without mixed precision, in the target's dtype and on its device.

    Args:
        head: The head in training, which stays as it is.
        target: The target.

    Returns:
        A copy in evaluation mode.
    """
    head = extract_model_from_parallel(copy.deepcopy(head), keep_fp32_wrapper=False, keep_torch_compile=False)
    # Not `head.to(dtype)`, which would round the frequencies of the rotary embedding too.
    for parameter in head.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(target.dtype)
    return head.to(device_of(target.get_output_embeddings())).eval()


def usable_prompts(prompts: list[Prompt], target: PreTrainedModel, max_new_tokens: int) -> list[Prompt]:
    """Leave out prompts that leave too little room for an answer in a table of learned positions.

    Args:
        prompts: The prompts.
        target: The target.
        max_new_tokens: Most tokens of an answer.

    Returns:
        The others.
    """
    limit = position_table_length(target)
    usable = [prompt for prompt in prompts if limit is None or len(prompt) + max_new_tokens <= limit]
    if prompts and not usable:
        logger.warning_once("tau is not measured: no prompt of the evaluation dataset leaves room for an answer.")
    return usable


def decode_prompts(
    head: FSPADModel | PeftModel,
    target: PreTrainedModel,
    prompts: list[Prompt],
    max_new_tokens: int,
    plain_answers: dict[Prompt, measuring.Answer],
) -> dict[str, float]:
    """Decode prompts greedily with the head, and plainly if they were not before; processes share the prompts out.

    The random state of torch is left changed, as [`~fspad.bench.measuring.measure`] seeds it.

    Args:
        head: The head in training, which stays as it is.
        target: The target, in evaluation mode.
        prompts: The prompts, at least one, the same in every process. All processes must call this.
        max_new_tokens: Most tokens of an answer.
        plain_answers: Plain answers of this process, to which new ones are added.

    Returns:
        `tau` and `acceptance_depth_1` and so on (the share of steps that accept so many drafts in a row) of the head alone,
        with a tree of the reference size where its own is automatic, so that they do not depend on the machine; and
        `speedup` with the head as it will be used. All over all prompts, the same in every process.
    """
    deployed = as_deployed(head, target)
    mine = _share(prompts, target)
    new = [prompt for prompt in mine if prompt not in plain_answers]
    plain_answers.update(
        zip(new, _answer(target, None, [mine[prompt] for prompt in new], max_new_tokens), strict=True)
    )
    assisted = _answer(target, deployed, list(mine.values()), max_new_tokens)
    deployed.config.lookup = False
    if deployed.config.num_draft_tokens == "auto":
        deployed.config.num_draft_tokens = REFERENCE_DRAFT_TOKENS
    alone = _answer(target, deployed, list(mine.values()), max_new_tokens)
    own = list(zip((plain_answers[prompt] for prompt in mine), assisted, alone, strict=True))
    plain, assisted, alone = map(list, zip(*gather_object(own), strict=True))
    lengths = [length for answer in alone for length in answer.accept_lengths]
    depths = measuring.acceptance_by_depth(lengths)
    return {
        "tau": measuring.mean_tokens_per_step(lengths),
        "speedup": measuring.Comparison(plain, assisted).speedup,
        **{f"acceptance_depth_{depth}": share for depth, share in enumerate(depths, start=1)},
    }


def compare_draft_sizes(
    head: FSPADModel | PeftModel, target: PreTrainedModel, prompts: list[Prompt], max_new_tokens: int
) -> dict[int | str, float]:
    """Measure the speed of a head with drafts of several sizes, all in turn on each prompt.

    Args:
        head: The trained head, which stays as it is.
        target: The target, in evaluation mode.
        prompts: The prompts, at least one, the same in every process. All processes must call this.
        max_new_tokens: Most tokens of an answer.

    Returns:
        By size, speed by that of plain decoding; the same in every process.
    """
    deployed = as_deployed(head, target)
    methods: tuple[int | str | None, ...] = (None, "auto", *DRAFT_SIZES)

    def answer(size: int | str | None, inputs: dict[str, torch.Tensor], length: int) -> measuring.Answer:
        deployed.config.num_draft_tokens = "auto" if size is None else size
        return measuring.measure(target, inputs, None if size is None else deployed, length)

    mine = list(_share(prompts, target).values())
    for size in methods if mine else ():
        answer(size, mine[0], min(measuring.WARM_UP_TOKENS, max_new_tokens))
    own = [{size: answer(size, inputs, max_new_tokens) for size in methods} for inputs in mine]
    answers = gather_object(own)
    speeds = {size: measuring.tokens_per_second([row[size] for row in answers]) for size in methods}
    return {size: speeds[size] / speeds[None] for size in methods[1:]}


def choose_draft_size(speedups: dict[int | str, float]) -> int | str:
    """Choose the size of drafts to save with a head.

    Args:
        speedups: By size, speed by that of plain decoding.

    Returns:
        The automatic size, which suits every machine, unless a fixed one is clearly faster here.
    """
    best = max(speedups, key=speedups.get)
    return best if speedups[best] > _WORTH_FIXING * speedups["auto"] else "auto"


def _share(prompts: list[Prompt], target: PreTrainedModel) -> dict[Prompt, dict[str, torch.Tensor]]:
    """The inputs of those prompts that this process decodes."""
    state = PartialState()
    device = device_of(target.get_input_embeddings())
    inputs = {}
    for prompt in prompts[state.process_index :: state.num_processes]:
        input_ids = torch.tensor([prompt], device=device)
        inputs[prompt] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return inputs


def _answer(
    target: PreTrainedModel,
    head: FSPADModel | PeftModel | None,
    inputs: list[dict[str, torch.Tensor]],
    max_new_tokens: int,
) -> list[measuring.Answer]:
    """Answer prompts after a warm-up."""
    for warm_up in inputs[:1]:
        measuring.measure(target, warm_up, head, min(measuring.WARM_UP_TOKENS, max_new_tokens))
    return [measuring.measure(target, values, head, max_new_tokens) for values in inputs]


class EvaluationMixin:
    """Evaluates the heads of a [`~transformers.Trainer`]."""

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
        self._eval_sums.add(outputs["sums"])
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
        self._eval_sums = LossSums()
        self._eval_prompts: list[list[Prompt]] = []
        device = self.args.device
        # Data loaders and decoding draw numbers or seed them, which must not change the training that goes on afterwards.
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            sums = self._eval_sums.map(lambda value: self.accelerator.reduce(value, "sum").cpu())
            metrics = sums.averages(self.args.draft_step_weights, top_k=self.model.config.draft_top_k)
            if self.args.num_eval_prompts > 0 and self._can_decode():
                prompts = first_prompts(self._eval_prompts, self.args.num_eval_prompts)
                if prompts := usable_prompts(prompts, self.target, self.args.eval_max_new_tokens):
                    metrics |= decode_prompts(
                        self.model, self.target, prompts, self.args.eval_max_new_tokens, self._plain_answers
                    )
        if metrics.get("speedup", 1.0) < 1.0:
            logger.warning(
                f"The head makes its target slower on this machine so far: {metrics['speedup']:.2f} times the speed of plain "
                f"decoding, with tau {metrics['tau']:.2f}."
            )
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _can_decode(self) -> bool:
        if not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            return True
        logger.warning_once(
            "tau is not measured during training: the head is sharded over processes, which decode different prompts. "
            "Measure it with the saved head, and set `num_eval_prompts=0`."
        )
        return False

    def measure_draft_size(self) -> dict[int | str, float]:
        """Choose how many drafted tokens the head verifies in a step, by measurement, into its configuration.

        The prompts are those of an evaluation or, without an evaluation dataset, the first ones trained on.

        Returns:
            By size, speed by that of plain decoding; empty if nothing could be measured.
        """
        if self.args.num_eval_prompts == 0 or not self._can_decode():
            return {}
        prompts = usable_prompts(self._draft_size_prompts(), self.target, self.args.eval_max_new_tokens)
        if not prompts:
            return {}
        device = self.args.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            speedups = compare_draft_sizes(self.model, self.target, prompts, self.args.eval_max_new_tokens)
        chosen = self.model.config.num_draft_tokens = choose_draft_size(speedups)
        told = ", ".join(f"{size} {speedup:.2f}" for size, speedup in speedups.items())
        self.tell(f"Speed by number of drafted tokens, plain decoding being 1: {told}. Saved with the head: {chosen}.")
        if speedups[chosen] < 1.0:
            logger.warning(
                f"The head makes its target slower on this machine: {speedups[chosen]:.2f} times the speed of plain decoding. "
                "Train it longer or on more dialogues, trim its vocabulary, or do not use it here."
            )
        return speedups

    def _draft_size_prompts(self) -> list[Prompt]:
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        dataset = next((dataset for dataset in datasets.values() if dataset is not None), self.train_dataset)
        rows = islice(dataset.select_columns(["input_ids", "assistant_mask"]), 8 * self.args.num_eval_prompts)
        prompts = [prompt for row in rows for prompt in find_prompts(self.data_collator([row]))]
        return list(dict.fromkeys(prompts))[: self.args.num_eval_prompts]
