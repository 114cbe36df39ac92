"""Speculative decoding of held-out prompts during training: what accuracies stand for is measured itself."""

from __future__ import annotations

import copy
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather_object
from transformers.utils import logging

from fspad.bench import measuring
from fspad.bench.methods import REFERENCE_DRAFT_TOKENS
from fspad.position_limits import position_table_length
from fspad.target import device_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fspad import FSPADModel

logger = logging.get_logger(__name__)

# Of tokens; hashable, so that the distinct ones can be told.
Prompt = tuple[int, ...]


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


def decode_prompts(
    head: FSPADModel | PeftModel, target: PreTrainedModel, prompts: list[Prompt], max_new_tokens: int
) -> dict[str, float]:
    """Decode prompts greedily, plainly and with the head; processes share the prompts out.

    The random state of torch is left changed, as [`~fspad.bench.measuring.measure`] seeds it.

    Args:
        head: The head in training, which stays as it is.
        target: The target, in evaluation mode.
        prompts: The prompts, the same in every process. All processes must call this.
        max_new_tokens: Most tokens of an answer. Prompts that leave less room in a table of learned positions are left
            out.

    Returns:
        `tau` of the head alone, with a tree of the reference size where its own is automatic, so that it does not depend
        on the machine; and `speedup` with the head as it will be used. Both over all prompts, the same in every process;
        nothing if no prompt is left.
    """
    limit = position_table_length(target)
    prompts = [prompt for prompt in prompts if limit is None or len(prompt) + max_new_tokens <= limit]
    if not prompts:
        logger.warning_once("tau is not measured: no prompt of the evaluation dataset leaves room for an answer.")
        return {}
    state = PartialState()
    device = device_of(target.get_input_embeddings())
    inputs = []
    for prompt in prompts[state.process_index :: state.num_processes]:
        input_ids = torch.tensor([prompt], device=device)
        inputs.append({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})
    deployed = as_deployed(head, target)
    comparisons = measuring.compare(target, deployed, inputs, max_new_tokens) if inputs else []
    deployed.config.lookup = False
    if deployed.config.num_draft_tokens == "auto":
        deployed.config.num_draft_tokens = REFERENCE_DRAFT_TOKENS
    alone = [measuring.measure(target, prompt, deployed, max_new_tokens) for prompt in inputs]
    gathered = gather_object(list(zip(comparisons, alone, strict=True)))
    return {
        "tau": measuring.Comparison([], [answer for _, answer in gathered]).tau,
        "speedup": measuring.total([comparison for comparison, _ in gathered]).speedup,
    }
