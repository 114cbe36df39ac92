"""A tree in the target's attention: the mask under which it is verified, and what hidden states and attentions keep of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .target_config import common_value
from .tree import DraftTree

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def tree_attention_mask(
    tree: DraftTree, cache: Cache, target: PreTrainedModel, padding_mask: torch.Tensor | None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The additive mask under which all nodes of a tree see their ancestors and the past.

    Distances are counted along the tree (a node at depth d stands d behind the root), so that sliding windows end where
    they end in plain decoding.

    Args:
        tree: The tree, about to be appended to the cache.
        cache: The target's cache before the tree.
        target: The model that verifies.
        padding_mask: 1 for tokens and 0 for padding among the cached positions, of shape `(batch, past or more)`, or
            `None`.

    Returns:
        A mask of shape `(batch, 1, nodes, kept past + nodes)` in the target's dtype, or one per layer type, whichever
        the target's layers expect.
    """
    text_config = target.config.get_text_config(decoder=True)
    layer_types = getattr(text_config, "layer_types", None)
    sliding_window = common_value(text_config, "sliding_window")
    if layer_types is None:
        return _mask_of_layer(tree, cache, 0, sliding_window, padding_mask, target.dtype)
    masks = {}
    for layer_type in dict.fromkeys(layer_types):
        # The layer that the target itself would size this mask by
        is_sliding = layer_type == "sliding_attention"
        sized = (i for i, layer in enumerate(cache.layers) if hasattr(layer, "get_mask_sizes"))
        layer_idx = next((i for i in sized if cache.is_sliding[i] == is_sliding), 0)
        window = sliding_window if is_sliding else None
        masks[layer_type] = _mask_of_layer(tree, cache, layer_idx, window, padding_mask, target.dtype)
    return masks


def _mask_of_layer(
    tree: DraftTree,
    cache: Cache,
    layer_idx: int,
    window: int | None,
    padding_mask: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    past_length = cache.get_seq_length()
    _, offset = cache.get_mask_sizes(tree.num_nodes, layer_idx)
    ancestors = tree.ancestors
    sees_past = ancestors.new_ones(*ancestors.shape[:2], past_length - offset)
    if padding_mask is not None:
        sees_past &= padding_mask[:, None, offset:past_length].to(ancestors.device).bool()
    if window is not None:
        depths = tree.depths
        past = torch.arange(offset, past_length, device=ancestors.device)  # (kept past,)
        sees_past &= past_length + depths[..., None] - past < window
        ancestors = ancestors & (depths[:, :, None] - depths[:, None, :] < window)
    return additive_mask(torch.cat([sees_past, ancestors], dim=-1), dtype)


def additive_mask(allowed: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask that attention adds to its scores.

    Args:
        allowed: Which keys each query sees, of shape `(batch, queries, keys)`.
        dtype: Dtype of the scores.

    Returns:
        0 where a key is seen and the lowest number elsewhere, of shape `(batch, 1, queries, keys)`.
    """
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def hidden_states_of_path(
    layers: tuple[torch.Tensor | None, ...], path: list[int]
) -> list[tuple[torch.Tensor | None, ...]]:
    """Cut the hidden states of a tree into what plain decoding returns token by token.

    Args:
        layers: One tensor a layer, of shape `(..., nodes, hidden)`, or `None` for a layer that was not asked for.
        path: Indices of the accepted nodes in order, root first.

    Returns:
        For each accepted node a tuple over layers of shape `(..., 1, hidden)`.
    """
    return [tuple(None if layer is None else layer[..., node : node + 1, :] for layer in layers) for node in path]


def attentions_of_path(
    layers: tuple[torch.Tensor | None, ...], path: list[int], num_nodes: int, windows: list[int | None]
) -> list[tuple[torch.Tensor | None, ...]]:
    """Cut the attentions of a tree into what plain decoding returns token by token.

    Args:
        layers: One tensor an attention layer, of shape `(batch, heads, nodes, kept past + nodes)`, or `None` where the
            attention implementation gives none.
        path: Indices of the accepted nodes in order, root first.
        num_nodes: Nodes of the tree.
        windows: The sliding window of each layer, see [`attention_windows`].

    Returns:
        For each accepted node a tuple over layers of shape `(batch, heads, 1, keys)`.
    """
    steps = []
    for step, node in enumerate(path):
        row = []
        for attentions, window in zip(layers, windows, strict=True):
            if attentions is None:
                row.append(None)
                continue
            num_past = attentions.shape[-1] - num_nodes
            keys = [*range(num_past), *(num_past + ancestor for ancestor in path[: step + 1])]
            keys = keys if window is None else keys[-window:]
            row.append(attentions[:, :, node : node + 1, torch.tensor(keys, device=attentions.device)])
        steps.append(tuple(row))
    return steps


def attention_windows(config: PreTrainedConfig, cache: Cache, num_layers: int) -> list[int | None]:
    """How many keys each layer attends to.

    Args:
        config: The target's text configuration.
        cache: The target's cache.
        num_layers: Number of layers that return attentions.

    Returns:
        The window of each of them, `None` for full attention.
    """
    layer_types = getattr(config, "layer_types", None) or ()
    # Layers that use the keys and values of others have a type, but no cache layer
    if len(layer_types) == num_layers:
        windows = {
            "sliding_attention": common_value(config, "sliding_window"),
            "chunked_attention": common_value(config, "attention_chunk_size"),
        }
        return [windows.get(layer_type) for layer_type in layer_types]
    layers = cache.layers
    if len(layers) != num_layers:  # layers without attention have no attentions
        layers = [layer for layer in layers if isinstance(layer, DynamicLayer)]
    return [layer.sliding_window if getattr(layer, "is_sliding", False) else None for layer in layers]
