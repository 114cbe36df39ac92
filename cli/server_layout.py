"""Writes an FSPAD head in the layout that inference servers read: one Llama-style draft layer, original weight names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fspad import FSPADConfig, FSPADModel

from .convert import DRAFT_TO_TARGET, DRAFTING_FIELDS, check_destination, original_names
from .loading import load_head

ARCHITECTURE = "EagleFspadLlamaForCausalLM"


def export_head(source: str | Path, destination: Path) -> FSPADModel:
    """Export a head; `fspad convert` takes the result back, bit for bit.

    The target's embedding and LM head are not in it: servers share those of the target. A draft vocabulary is the tensor
    `d2t`, the target's token id minus the draft's, as EAGLE-3 checkpoints have it.

    Args:
        source: Folder or Hub id of the head.
        destination: Folder to write `config.json` and `model.safetensors` to; new or empty.

    Returns:
        The head that was exported.

    Raises:
        ValueError: If the source is no FSPAD head.
        FileExistsError: If the destination holds something already.
    """
    from safetensors.torch import save_file

    check_destination(destination)
    head = load_head(str(source), "auto")
    names = {new: old for old, new in original_names(head.config).items()}
    weights = {names[name]: tensor.contiguous() for name, tensor in head.state_dict().items() if name in names}
    if (token_ids := head.active_draft_vocab_ids) is not None:
        weights[DRAFT_TO_TARGET] = token_ids.cpu() - torch.arange(token_ids.numel())
    destination.mkdir(parents=True, exist_ok=True)
    save_file(weights, destination / "model.safetensors", metadata={"format": "pt"})
    (destination / "config.json").write_text(json.dumps(server_config(head), indent=2, sort_keys=True) + "\n")
    return head


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
    fields += ("bos_token_id", "eos_token_id", "pad_token_id", *DRAFTING_FIELDS)
    rope = dict(config.rope_parameters or {})
    # The older form too, which servers and the original implementation read.
    older = {"rope_theta": rope.pop("rope_theta", 10000.0), "rope_scaling": None}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = rope
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "fc_bias": True,
        "dtype": str(head.dtype).removeprefix("torch."),
        **older,
        **{name: getattr(config, name) for name in fields},
    }
