"""`fspad export`: an FSPAD head as inference servers read it, one Llama-style draft layer with original weight names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fspad import FSPADConfig, FSPADModel
from fspad.serving import ARCHITECTURE

from .convert import DRAFT_TO_TARGET, DRAFTING_FIELDS, check_destination, original_names
from .loading import load_head

# vLLM's own class for EAGLE-1/2 heads: no bias in the input layer, and the whole vocabulary
EAGLE_ARCHITECTURE = "EagleLlamaForCausalLM"
INPUT_BIAS = "fc.bias"


def export_head(source: str | Path, destination: Path, revision: str | None = None) -> FSPADModel:
    """Export a head; `fspad convert` takes the result back, bit for bit.

    The target's embedding and LM head are not in it: servers share those of the target. A draft vocabulary is the tensor
    `d2t`, the target's token id minus the draft's, as EAGLE-3 checkpoints have it, and `draft_vocab_size` in the
    configuration. A head that is an EAGLE-1/2 head becomes one that vLLM reads by itself.

    Args:
        source: Folder or Hub id of the head.
        destination: Folder to write `config.json` and `model.safetensors` to; new or empty.
        revision: Revision of the head on the Hub.

    Returns:
        The head that was exported.

    Raises:
        ValueError: If the source is no FSPAD head.
        FileExistsError: If the destination holds something already.
    """
    from safetensors.torch import save_file

    check_destination(destination)
    head = load_head(str(source), "auto", revision)
    names = {new: old for old, new in original_names(head.config).items()}
    weights = {names[name]: tensor.contiguous() for name, tensor in head.state_dict().items() if name in names}
    if (token_ids := head.active_draft_vocab_ids) is not None:
        weights[DRAFT_TO_TARGET] = token_ids.cpu() - torch.arange(token_ids.numel())
    if is_eagle(head):
        del weights[INPUT_BIAS]
    destination.mkdir(parents=True, exist_ok=True)
    save_file(weights, destination / "model.safetensors", metadata={"format": "pt"})
    (destination / "config.json").write_text(json.dumps(server_config(head), indent=2, sort_keys=True) + "\n")
    return head


def is_eagle(head: FSPADModel) -> bool:
    """Whether a head computes what vLLM's class for EAGLE-1/2 heads computes.

    Args:
        head: The head.
    """
    config = head.config
    is_plain = not (config.feature_sampling or config.partial_alignment) and config.draft_vocab_size is None
    return is_plain and not head.feature_sampling.fc.bias.any().item()


def server_config(head: FSPADModel) -> dict[str, Any]:
    """The `config.json` of the exported head.

    Args:
        head: The head.

    Returns:
        Fields of a one-layer Llama, and what a server must know beyond: `fc_bias` and the drafting knobs.
    """
    config: FSPADConfig = head.config
    fields = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    fields += ("hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "rope_parameters")
    fields += ("feature_sampling", "partial_alignment")
    fields += ("bos_token_id", "eos_token_id", "pad_token_id", *DRAFTING_FIELDS)
    rope = dict(config.rope_parameters or {})
    # The older form too, which servers and the original implementation read.
    older = {"rope_theta": rope.pop("rope_theta", 10000.0), "rope_scaling": None}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = rope
    return {
        "architectures": [EAGLE_ARCHITECTURE if is_eagle(head) else ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "fc_bias": not is_eagle(head),
        "dtype": str(head.dtype).removeprefix("torch."),
        **older,
        **({} if config.draft_vocab_size is None else {"draft_vocab_size": config.draft_vocab_size}),
        **{name: getattr(config, name) for name in fields},
    }
