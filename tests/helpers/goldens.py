"""Outputs of the original implementation: inputs, weights, predictions and greedy trees of all four variants."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import fspad
from fspad.cli.convert import convert_state_dict

# Feature sampling and partial alignment of each variant
VARIANTS = {
    "fspad": (True, True),
    "no_feature_sampling": (False, True),
    "no_partial_alignment": (True, False),
    "eagle": (False, False),
}
FOLDER = Path(__file__).parents[1] / "golden"


@dataclass
class Golden:
    """One golden file, with the head it describes and a target that lends its embedding and LM head."""

    metadata: dict[str, str]
    tensors: dict[str, torch.Tensor]
    head: fspad.FSPADModel
    target: transformers.PreTrainedModel


def read_metadata(variant: str) -> dict[str, str]:
    """The metadata of a golden file, with the sizes.

    Args:
        variant: One of `VARIANTS`.
    """
    with safe_open(FOLDER / f"{variant}.safetensors", "pt") as file:
        return file.metadata()


def read_golden(variant: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """Weights of the checkpoint, all other tensors, and the config.json that belongs to them.

    Args:
        variant: One of `VARIANTS`.
    """
    tensors, metadata = load_file(FOLDER / f"{variant}.safetensors"), read_metadata(variant)
    prefix = "state_dict."
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    rest = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": metadata["hidden_act"],
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "rms_norm_eps": float(metadata["rms_norm_eps"]),
        "rope_scaling": None,
        "rope_theta": float(metadata["rope_theta"]),
        "torch_dtype": "float16",
        **{name: int(metadata[name]) for name in sizes},
    }
    return weights, rest, config


def load_golden(variant: str) -> Golden:
    """Load a golden file.

    Args:
        variant: One of `VARIANTS`.
    """
    weights, rest, fields = read_golden(variant)
    other = ("architectures", "model_type", "pad_token_id", "rope_scaling", "torch_dtype")
    config = transformers.LlamaConfig(**{name: value for name, value in fields.items() if name not in other})
    head = convert_state_dict(weights, fields, config)
    target = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        target.get_input_embeddings().weight.copy_(weights["embed_tokens.weight"])
        target.get_output_embeddings().weight.copy_(rest["lm_head"])
    return Golden(read_metadata(variant), rest, head, target)
