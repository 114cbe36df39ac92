"""`fspad convert`: checkpoints of the original FSPAD implementation and of EAGLE-1/2 as FSPAD heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fspad import FSPADConfig, FSPADModel
from fspad.bench.smollm2 import quiet_loading
from fspad.config_checks import shorten_names
from fspad.provenance import target_id

from .loading import damage_in_one_line
from .source_checkpoint import DROPPED, layer_fields, load_weights, read_config

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


def convert_checkpoint(source: str, destination: Path, target: str | None, revision: str | None = None) -> FSPADModel:
    """Convert a checkpoint and save the head.

    Args:
        source: Folder or Hub id of a checkpoint with `config.json` and weights, see [`load_weights`].
        destination: Folder to write the head to; new or empty.
        target: Hub id or folder of the target; only its configuration is loaded.
        revision: Revision of the checkpoint on the Hub.

    Returns:
        The head, as it was saved.

    Raises:
        OSError: If there is no such checkpoint, or it lacks a file.
        ValueError: If the checkpoint is unreadable, is no FSPAD or EAGLE-1/2 head, or does not fit the target, or if
            there is no target.
        FileExistsError: If the destination holds something already.
    """
    from transformers import AutoConfig

    check_destination(destination)
    config = read_config(source, revision)
    if config.get("model_type") == FSPADConfig.model_type:
        raise ValueError(
            f"expected an FSPAD or EAGLE-1/2 checkpoint, got an FSPAD head: `fspad export {source} {destination}` makes a "
            "checkpoint of it"
        )
    if target is None:
        raise ValueError(f"expected --target ID, the model that the checkpoint {source} was trained for, got none")
    layer_fields(config)  # before the weights, which may be large
    with damage_in_one_line(f"the target {target}"):
        # transformers makes a dictionary of `num_labels` names, whatever their number
        target_config = AutoConfig.from_pretrained(target, num_labels=2, trust_remote_code=False)
    head = convert_state_dict(load_weights(source, revision), config, target_config)
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
    state_dict: dict[str, torch.Tensor], source_config: dict[str, Any], target_config: PreTrainedConfig
) -> FSPADModel:
    """Make the FSPAD head that computes the same function as a checkpoint.

    The variant, the attention heads and the biases follow from the names and shapes of the weights. A missing bias of the
    input layer becomes zeros.

    Args:
        state_dict: The checkpoint's weights, with or without the prefix `model.`.
        source_config: Contents of the checkpoint's `config.json`.
        target_config: The target's configuration. Vocabulary, special tokens and context length are taken from it.

    Returns:
        The head in evaluation mode, in the dtype of the checkpoint.

    Raises:
        ValueError: If a weight is missing, unexpected, or of another shape than expected, or if hidden size or
            vocabulary differ from the target's.
    """
    fields = layer_fields(source_config)
    _check_sizes(fields, target_config)
    weights = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
    if len(weights) < len(state_dict):
        raise ValueError("some weights are there twice, with and without the prefix 'model.': remove one set")
    weights = {name: tensor for name, tensor in weights.items() if not DROPPED.fullmatch(name)}
    draft_to_target = weights.pop(DRAFT_TO_TARGET, None)
    config = _head_config(weights, fields, source_config, target_config)
    names = original_names(config)
    # Biases that a checkpoint may leave out; zeros are the same function.
    optional = {"fc.fc.bias", "fc.bias", "layers.0.self_attn.o_proj.bias"} & set(names)
    _check_names(expected=set(names), got=set(weights) | optional)
    dtype = _common_dtype(weights)
    weights = {**{name: torch.zeros(config.hidden_size, dtype=dtype) for name in optional}, **weights}

    with torch.device("meta"):
        expected_shapes = {name: tensor.shape for name, tensor in FSPADModel(config).state_dict().items()}
    _check_shapes(weights, {name: expected_shapes[new_name] for name, new_name in names.items()})
    renamed = {names[name]: tensor for name, tensor in weights.items()}
    head = FSPADModel.from_pretrained(None, config=config, state_dict=renamed, dtype=dtype).eval()
    if draft_to_target is not None:
        head.set_draft_vocabulary(_draft_vocabulary(draft_to_target))
    return head


def _head_config(
    weights: dict[str, torch.Tensor],
    fields: dict[str, Any],
    source_config: dict[str, Any],
    target_config: PreTrainedConfig,
) -> FSPADConfig:
    """The configuration of the head, from what the files say and what the weights show."""
    hidden_size, heads = fields["hidden_size"], fields["num_attention_heads"]
    rows = {letter: _rows(weights, f"layers.0.self_attn.{letter}_proj.weight") for letter in "qk"}
    # Files leave out the key/value heads and the size of a head, and their model types have other defaults for them
    head_dim = rows["q"] // heads or hidden_size // heads
    down_rows = _rows(weights, "layers.0.mlp.down_proj.weight")
    layer = {name: fields[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    layer |= {name: fields[name] for name in ("hidden_act", "rms_norm_eps", "rope_parameters")}
    if fields["rope_parameters"]["rope_type"] == "dynamic":
        # Dynamic RoPE scales from this length on, so the target's would change what the head computes.
        layer["max_position_embeddings"] = fields["max_position_embeddings"]
    if target_id(target_config) is not None:
        # The user has named the target, and the file does not know better
        source_config = {name: value for name, value in source_config.items() if not name.startswith("target_")}
    return FSPADConfig.from_target(
        target_config,
        **layer,
        **{name: value for name in DRAFTING_FIELDS if (value := source_config.get(name)) is not None},
        head_dim=head_dim,
        num_key_value_heads=max(1, rows["k"] // max(1, head_dim)),
        attention_bias=any(f"layers.0.self_attn.{letter}_proj.bias" in weights for letter in "qkvo"),
        feature_sampling=any(name in weights for name in GATED_INPUT),
        partial_alignment=down_rows == 2 * hidden_size,
    )


def _rows(weights: dict[str, torch.Tensor], name: str) -> int:
    weight = weights.get(name)
    return weight.shape[0] if weight is not None and weight.dim() == 2 else 0


def _draft_vocabulary(draft_to_target: torch.Tensor) -> torch.Tensor:
    """The token ids of a draft vocabulary, from what has to be added to its own."""
    if draft_to_target.dim() != 1 or draft_to_target.is_floating_point():
        raise ValueError(
            f"expected the tensor {DRAFT_TO_TARGET} to hold one integer for each draft token, got "
            f"{draft_to_target.dtype} of shape {tuple(draft_to_target.shape)}"
        )
    return draft_to_target.long() + torch.arange(draft_to_target.numel())


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


def _check_sizes(fields: dict[str, Any], target_config: PreTrainedConfig) -> None:
    text_config = target_config.get_text_config(decoder=True)
    for name in ("hidden_size", "vocab_size"):
        got, expected = fields[name], getattr(text_config, name, None)
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
        missing, unexpected = (shorten_names(names) if names else "none" for names in (expected - got, got - expected))
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
