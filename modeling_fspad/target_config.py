"""What is read from the configuration of a target, whatever its family."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


def check_decoder_only(target_config: PreTrainedConfig) -> None:
    """Refuse targets whose decoder reads an encoder.

    Args:
        target_config: Configuration of a target.

    Raises:
        ValueError: If it is that of an encoder-decoder model.
    """
    if getattr(target_config, "is_encoder_decoder", False):
        raise ValueError(
            f"an FSPAD head assists decoder-only models, got the encoder-decoder {target_config.model_type!r}: call "
            "`generate` without `assistant_model`."
        )


def first_int(config: PreTrainedConfig, *names: str) -> int | None:
    """The first of these fields that holds one positive integer for all layers.

    Args:
        config: Configuration of a target.
        *names: The fields.
    """
    values = (common_value(config, name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def common_value(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    """A field of a target's configuration, or the default where its layers differ in it.

    Args:
        config: Configuration of a target.
        name: The field.
        default: For a field that is missing or has no one value.
    """
    try:
        return getattr(config, name, default)
    except RuntimeError:  # what transformers raises for a field with one value a layer
        return default


def attention_shape(text: PreTrainedConfig) -> dict[str, int]:
    """The target's attention heads where the head's plain attention can have them, else heads of 64 or the like.

    Args:
        text: The target's text configuration.
    """
    heads = first_int(text, "num_attention_heads") or max(1, text.hidden_size // 64)
    kv_heads = first_int(text, "num_key_value_heads") or heads
    head_dim = first_int(text, "head_dim") or text.hidden_size // heads
    if heads % kv_heads or head_dim % 2 or head_dim == 0:
        heads = next(n for n in range(max(1, text.hidden_size // 64), 0, -1) if text.hidden_size % (2 * n) == 0)
        kv_heads, head_dim = heads, text.hidden_size // heads
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def flat_rope_parameters(text: PreTrainedConfig) -> dict[str, Any] | None:
    """One set of RoPE parameters for the head's one full-attention layer, whose every dimension rotates.

    Args:
        text: The target's text configuration.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    if per_layer_type := [value for value in rope.values() if isinstance(value, dict)]:
        rope = rope.get("full_attention") or per_layer_type[0]
    if not isinstance(rope.get("rope_theta"), int | float):
        return None
    left_out = {"partial_rotary_factor", "mrope_section", "mrope_interleaved"}
    rope = {name: value for name, value in rope.items() if name not in left_out}
    # Dynamic and long RoPE would change the head's frequencies while it runs, and leave them changed
    if rope.get("rope_type") not in ("default", "linear", "yarn", "llama3"):
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return rope
