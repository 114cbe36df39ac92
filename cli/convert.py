"""Turns checkpoints of the original FSPAD implementation and of EAGLE-1/2 into FSPAD heads."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fspad import FSPADConfig, FSPADModel

from .smollm2 import quiet_loading

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GATED_INPUT = {
    "fc.fc.weight": "feature_sampling.fc.weight",
    "fc.fc.bias": "feature_sampling.fc.bias",
    "fc.post_attention_layernorm.weight": "feature_sampling.norm.weight",
    "fc.mlp.gate_proj.weight": "feature_sampling.mlp.gate_proj.weight",
    "fc.mlp.up_proj.weight": "feature_sampling.mlp.up_proj.weight",
    "fc.mlp.down_proj.weight": "feature_sampling.mlp.down_proj.weight",
}
PLAIN_INPUT = {"fc.weight": "feature_sampling.fc.weight", "fc.bias": "feature_sampling.fc.bias"}
DROPPED = "embed_tokens.weight"  # a copy of the target's own embedding
DRAFT_TO_TARGET = "d2t"  # the target's id of each draft token, minus the draft's own
# What `config.json` may say beyond the layer itself; exported heads do.
DRAFTING_FIELDS = (
    "draft_depth",
    "draft_top_k",
    "num_draft_tokens",
    "lookup",
    "target_model_name",
    "target_revision",
    "target_vocab_hash",
)


def is_head(source: Path) -> bool:
    """Whether a folder holds an FSPAD head, by its `config.json`.

    Args:
        source: The folder.
    """
    try:
        return json.loads((source / "config.json").read_text(encoding="utf-8")).get("model_type") == "fspad"
    except (OSError, ValueError, AttributeError):
        return False


def convert_checkpoint(source: Path, destination: Path, target: str | None) -> FSPADModel:
    """Convert a checkpoint folder and save the head.

    Args:
        source: Folder with `config.json` and `model.safetensors` or `pytorch_model.bin`.
        destination: Folder to write the head to; new or empty.
        target: Hub id or folder of the target; only its configuration is loaded.

    Returns:
        The head, as it was saved.

    Raises:
        ValueError: If the checkpoint is unreadable, is no FSPAD or EAGLE-1/2 head, or does not fit the target, or if
            there is no target.
        FileNotFoundError: If the source folder lacks a file.
        FileExistsError: If the destination holds something already.
    """
    from transformers import AutoConfig

    check_destination(destination)
    if target is None:
        raise ValueError(f"expected --target ID, the model that the checkpoint in {source} was trained for, got none")
    source_config = load_source_config(source)
    head = convert_state_dict(load_weights(source), source_config, AutoConfig.from_pretrained(target))
    with quiet_loading():
        head.save_pretrained(destination)
    return head


def check_destination(destination: Path) -> None:
    """Make sure that nothing is overwritten.

    Args:
        destination: Folder to write to.

    Raises:
        FileExistsError: If it holds something already.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists already: name a new or empty folder")


def convert_state_dict(
    state_dict: dict[str, torch.Tensor], source_config: PreTrainedConfig, target_config: PreTrainedConfig
) -> FSPADModel:
    """Make the FSPAD head that computes the same function as a checkpoint.

    The variant follows from the names and shapes of the weights. A missing bias of the input layer becomes zeros.

    Args:
        state_dict: The checkpoint's weights, with or without the prefix `model.`.
        source_config: The checkpoint's configuration, of model type `llama`.
        target_config: The target's configuration. Vocabulary, special tokens and context length are taken from it.

    Returns:
        The head in evaluation mode, in the dtype of the checkpoint.

    Raises:
        ValueError: If a weight is missing, unexpected, or of another shape than expected, or if hidden size or
            vocabulary differ from the target's.
    """
    _check_sizes(source_config, target_config)
    weights = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
    if len(weights) < len(state_dict):
        raise ValueError("some weights are there twice, with and without the prefix 'model.': remove one set")
    weights.pop(DROPPED, None)
    draft_to_target = weights.pop(DRAFT_TO_TARGET, None)
    dtype = _common_dtype(weights)
    is_gated = any(name in weights for name in GATED_INPUT)
    has_bias = any(f"layers.0.self_attn.{letter}_proj.bias" in weights for letter in "qkvo")
    down_proj = weights.get("layers.0.mlp.down_proj.weight")
    hidden_size = source_config.hidden_size
    config = FSPADConfig.from_target(
        target_config,
        **_layer_options(source_config),
        **{name: value for name in DRAFTING_FIELDS if (value := getattr(source_config, name, None)) is not None},
        attention_bias=has_bias,
        feature_sampling=is_gated,
        partial_alignment=down_proj is not None and down_proj.shape[:1] == (2 * hidden_size,),
    )
    # Biases that a checkpoint may leave out; zeros are the same function.
    optional = {"fc.fc.bias" if is_gated else "fc.bias": torch.zeros(hidden_size, dtype=dtype)}
    if has_bias:
        optional["layers.0.self_attn.o_proj.bias"] = torch.zeros(hidden_size, dtype=dtype)
    weights = {**optional, **weights}

    names = original_names(config)
    _check_names(expected=set(names), got=set(weights))
    with torch.device("meta"):
        expected_shapes = {name: tensor.shape for name, tensor in FSPADModel(config).state_dict().items()}
    _check_shapes(weights, {name: expected_shapes[new_name] for name, new_name in names.items()})
    renamed = {names[name]: tensor for name, tensor in weights.items()}
    head = FSPADModel.from_pretrained(None, config=config, state_dict=renamed, dtype=dtype).eval()
    if draft_to_target is not None:
        head.set_draft_vocabulary(draft_to_target.long() + torch.arange(draft_to_target.numel()))
    return head


def original_names(config: FSPADConfig) -> dict[str, str]:
    """How the original implementations call the weights of a head.

    Args:
        config: Configuration of the head.

    Returns:
        The head's name of each weight by its original name.
    """
    layer = [f"self_attn.{letter}_proj.weight" for letter in "qkvo"]
    layer += [f"self_attn.{letter}_proj.bias" for letter in "qkvo"] if config.attention_bias else []
    layer += [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")] + ["post_attention_layernorm.weight"]
    fused = GATED_INPUT if config.feature_sampling else PLAIN_INPUT
    return fused | {f"layers.0.{name}": f"layer.{name}" for name in layer}


def load_source_config(source: Path) -> PreTrainedConfig:
    """Load the configuration of a checkpoint; RoPE settings may be in the old form.

    Args:
        source: The checkpoint's folder.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: If there is no `config.json`.
        ValueError: If it is not of model type `llama`.
    """
    from transformers import LlamaConfig, PreTrainedConfig

    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json: name the folder of an FSPAD or EAGLE-1/2 checkpoint")
    fields, _ = PreTrainedConfig.get_config_dict(source)
    if fields.get("model_type") != "llama":
        raise ValueError(
            f"expected a config.json with model_type 'llama', as the FSPAD and EAGLE-1/2 checkpoints have, got "
            f"{fields.get('model_type')!r} in {source}"
        )
    return LlamaConfig.from_dict(fields)


def load_weights(source: Path) -> dict[str, torch.Tensor]:
    """Load the weights of a checkpoint without running any code it may hold.

    Args:
        source: The checkpoint's folder. `model.safetensors` goes before `pytorch_model.bin`.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: If there is neither file.
        ValueError: If the file is damaged, holds more than tensors, or wants to run code.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    safe, pickled = source / "model.safetensors", source / "pytorch_model.bin"
    try:
        if safe.is_file():
            return load_file(safe)
        if pickled.is_file():
            weights = torch.load(pickled, map_location="cpu", weights_only=True)
            if isinstance(weights, dict) and all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
                return weights
            raise ValueError(f"{pickled} holds no state dict: expected a dictionary of tensors by name")
    except SafetensorError as error:
        raise ValueError(f"{safe} is damaged or incomplete ({error}): download it again") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{pickled} is damaged or wants to run code while it is loaded; nothing of it was run. Expected a file "
            "that holds tensors only: save the state dict as model.safetensors where you trust the file."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{pickled} is damaged or incomplete: download it again") from error
    raise FileNotFoundError(f"{source} holds neither {safe.name} nor {pickled.name}")


def _layer_options(source_config: PreTrainedConfig) -> dict[str, object]:
    fields = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
    options = {name: getattr(source_config, name) for name in [*fields, "hidden_act", "rms_norm_eps"]}
    options["rope_parameters"] = source_config.rope_parameters
    if (source_config.rope_parameters or {}).get("rope_type") == "dynamic":
        # Dynamic RoPE scales from this length on, so the target's would change what the head computes.
        options["max_position_embeddings"] = source_config.max_position_embeddings
    return options


def _check_sizes(source_config: PreTrainedConfig, target_config: PreTrainedConfig) -> None:
    text_config = target_config.get_text_config(decoder=True)
    for name in ("hidden_size", "vocab_size"):
        got, expected = getattr(source_config, name), getattr(text_config, name)
        if got != expected:
            raise ValueError(
                f"the checkpoint does not fit the target: the checkpoint has {name}={got}, the target "
                f"{name}={expected}. Name the target that the checkpoint was trained for."
            )


def _common_dtype(weights: dict[str, torch.Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(f"expected weights of one floating-point dtype, got {', '.join(sorted(map(str, dtypes)))}")
    return dtypes.pop() if dtypes else torch.float32


def _check_names(expected: set[str], got: set[str]) -> None:
    if expected != got:
        missing, unexpected = (", ".join(sorted(names)) or "none" for names in (expected - got, got - expected))
        raise ValueError(
            "the weights are not those of an FSPAD or EAGLE-1/2 head.\n"
            f"  missing: {missing}\n  unexpected: {unexpected}\nOther kinds of heads (EAGLE-3, Medusa) compute "
            "another function and cannot be converted."
        )


def _check_shapes(weights: dict[str, torch.Tensor], expected: dict[str, torch.Size]) -> None:
    wrong = [
        f"  {name}: expected {tuple(shape)}, got {tuple(weights[name].shape)}"
        for name, shape in sorted(expected.items())
        if weights[name].shape != shape
    ]
    if wrong:
        raise ValueError("weights have other shapes than config.json says:\n" + "\n".join(wrong))
