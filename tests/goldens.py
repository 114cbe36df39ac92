"""Outputs of the original implementation: inputs, weights, predictions and greedy trees of all four variants."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

import fspad
from fspad.cli.convert import convert_state_dict

VARIANTS = ("fspad", "no_feature_sampling", "no_partial_alignment", "eagle")


@dataclass
class Golden:
    """One golden file, with the head it describes and a target that lends its embedding and LM head."""

    metadata: dict[str, str]
    tensors: dict[str, torch.Tensor]
    head: fspad.FSPADModel
    target: transformers.PreTrainedModel


def load_golden(variant: str) -> Golden:
    """Load a golden file.

    Args:
        variant: One of `VARIANTS`.
    """
    with safe_open(Path(__file__).parent / "golden" / f"{variant}.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    sizes = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
    config = transformers.LlamaConfig(
        **{name: int(metadata[name]) for name in sizes},
        num_hidden_layers=1,
        rms_norm_eps=float(metadata["rms_norm_eps"]),
        rope_parameters={"rope_type": "default", "rope_theta": float(metadata["rope_theta"])},
    )
    state_dict = {
        name.removeprefix("state_dict."): tensor for name, tensor in tensors.items() if name.startswith("state_dict.")
    }
    head = convert_state_dict(state_dict, config, config)
    target = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        target.get_input_embeddings().weight.copy_(state_dict["embed_tokens.weight"])
        target.get_output_embeddings().weight.copy_(tensors["lm_head"])
    return Golden(metadata, tensors, head, target)
