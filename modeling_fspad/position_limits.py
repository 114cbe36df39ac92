"""How far drafts may reach before their positions change what plain decoding would compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .target_config import common_value

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS = ("max_target_positions", "max_position_embeddings", "n_positions", "max_seq_len")


class PositionLimits:
    """Where the positions of a target end or change their meaning. Counts along with the tokens of one call.

    - Tables of positions or distances (learned, sinusoidal, alibi) end.
    - Dynamic RoPE changes its frequencies with every position past its limit, and long RoPE once: for a whole forward
      pass, by the largest position in it.
    - Some families drop their cache at a length of `original_max_position_embeddings`, whatever their RoPE.

    Up to such a limit drafts are cut, and it is crossed as plain decoding does.

    Args:
        target: The model that verifies.
    """

    def __init__(self, target: PreTrainedModel):
        config = target.config.get_text_config(decoder=True)
        rope = getattr(config, "rope_parameters", None) or {}
        ropes = [value for value in rope.values() if isinstance(value, dict)] or ([rope] if rope else [])
        by_type = {value.get("rope_type"): value for value in ropes}
        self.table_length = position_table_length(target)
        # The first position at which something changes, and whether it changes again at each one after it
        self.ends_at = self.changes_at = None
        if not ropes or "dynamic" in by_type:
            lengths = (common_value(config, name) for name in _LENGTHS)
            self.ends_at = next((value for value in lengths if isinstance(value, int) and value > 0), None)
        elif self.table_length is not None:
            self.ends_at = self.table_length
        if "longrope" in by_type:
            self.changes_at = by_type["longrope"]["original_max_position_embeddings"]
        resets_at = getattr(target.config, "original_max_position_embeddings", None)
        self.resets_at = resets_at if isinstance(resets_at, int) else None
        self.position = 0

    def start(self, model_kwargs: dict[str, Any]) -> None:
        """Note where the first new token stands.

        Args:
            model_kwargs: The model inputs after the prefill.
        """
        position_ids = model_kwargs.get("position_ids")
        if position_ids is not None:
            self.position = int(position_ids[..., -1].max())
        elif (padding_mask := model_kwargs.get("attention_mask")) is not None:
            self.position = int(padding_mask.sum(-1).max()) - 1
        else:
            self.position = model_kwargs["past_key_values"].get_seq_length()

    def advance(self, num_tokens: int) -> None:
        """Move on by as many positions."""
        self.position += num_tokens

    def max_depth(self, num_tokens: int, num_cached: int) -> int | None:
        """Levels below the root that stay within all limits; `None` for no limit.

        Args:
            num_tokens: Tokens so far, the root included.
            num_cached: Tokens in the cache.
        """
        depths = []
        if self.ends_at is not None:
            depths.append(self.ends_at - 1 - self.position)
        if self.changes_at is not None and self.position < self.changes_at:
            depths.append(self.changes_at - 1 - self.position)
        # Some releases compute but one token anew, and so reset at every token from there on
        if self.resets_at is not None and num_cached <= self.resets_at:
            depths.append(self.resets_at - num_tokens)
        return max(0, min(depths)) if depths else None


def position_table_length(target: PreTrainedModel) -> int | None:
    """Length of a target's table of learned positions; `None` for other kinds of positions.

    Args:
        target: Any causal language model.
    """
    names = ("wpe", "embed_positions", "embed_position", "position_embeddings")
    tables = [m for n, m in target.named_modules() if n.endswith(names) and isinstance(m, torch.nn.Embedding)]
    limit = common_value(target.config.get_text_config(decoder=True), "max_position_embeddings")
    return limit if tables and isinstance(limit, int) and limit > 0 else None
