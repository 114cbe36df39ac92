"""How a target verifies: which targets can take a tree, the tree's attention mask, and the cache after it."""

from __future__ import annotations

import inspect
from enum import Enum
from typing import TYPE_CHECKING

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from .configuration_fspad import common_value
from .tree import DraftTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Layers that use the keys and values of others have an empty cache layer, which older releases do not know
SHARED_LAYER = getattr(cache_utils, "DummyLayer", DynamicLayer)
# What is known to verify a tree exactly. Anything else gets the chain.
TREE_LAYER_TYPES = {"full_attention", "sliding_attention"}
TREE_CACHE_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer, SHARED_LAYER}
TREE_ATTENTION = {"eager", "sdpa"}
# What can be rolled back token by token. Anything else gets plain decoding.
CHAIN_CACHE_LAYERS = (DynamicLayer, LinearAttentionLayer, SHARED_LAYER)


class VerificationMode(Enum):
    """How drafts are verified."""

    TREE = "tree"
    CHAIN = "chain"
    PLAIN = "plain decoding"


def choose_verification(target: PreTrainedModel, cache: Cache | None) -> tuple[VerificationMode, str | None]:
    """Decide how a target can verify drafts exactly.

    Args:
        target: The model that verifies.
        cache: The cache that `generate` prepared for it.

    Returns:
        The mode, and the reason when it is not the tree.
    """
    text_config = target.config.get_text_config(decoder=True)
    name = type(target).__name__
    layer_types = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    if target._is_stateful or layer_types & {"linear_attention", "hybrid", "hybrid_sliding"}:
        return VerificationMode.PLAIN, f"{name} has a recurrent state that cannot be rolled back"
    forward_arguments = inspect.signature(target.forward).parameters
    if "past_key_values" not in forward_arguments:
        return VerificationMode.PLAIN, f"{name} has no cache"
    if "prepare_inputs_for_generation" in vars(target):
        # PEFT does this for prompt and prefix tuning, whose virtual tokens have no ids, embeddings or positions here
        return VerificationMode.PLAIN, f"a wrapper of {name} adds virtual tokens to its inputs"
    if common_value(text_config, "cross_attention_layers"):
        return VerificationMode.PLAIN, f"{name} keeps image states in its cache"
    if type(cache) is not DynamicCache:
        return VerificationMode.PLAIN, f"{type(cache).__name__} cannot be rolled back"
    cache_layers = {type(layer) for layer in cache.layers} or {DynamicLayer}
    if not all(issubclass(layer, CHAIN_CACHE_LAYERS) for layer in cache_layers):
        return VerificationMode.PLAIN, f"the cache of {name} cannot be rolled back"

    attention = text_config._attn_implementation
    if attention not in TREE_ATTENTION:
        return VerificationMode.CHAIN, f"the attention implementation {attention!r} takes no tree mask"
    has_window = isinstance(common_value(text_config, "sliding_window"), int) or layer_types == {"full_attention"}
    if not (layer_types <= TREE_LAYER_TYPES and cache_layers <= TREE_CACHE_LAYERS and has_window):
        return VerificationMode.CHAIN, f"{name} has layers that are not known to verify a tree exactly"
    # Models outside of the attention interface derive positions or masks from cache slots, some of them in silence
    if not ("position_ids" in forward_arguments and target._supports_attention_backend):
        return VerificationMode.CHAIN, f"{name} derives positions from cache slots"
    if getattr(cache, "offloading", False):
        return VerificationMode.CHAIN, "the cache is offloaded"
    return VerificationMode.TREE, None


def learned_positions(target: PreTrainedModel) -> int | None:
    """Length of a target's table of learned positions; `None` for other kinds of positions."""
    names = ("wpe", "embed_positions", "embed_position", "position_embeddings")
    tables = [m for n, m in target.named_modules() if n.endswith(names) and isinstance(m, torch.nn.Embedding)]
    limit = common_value(target.config.get_text_config(decoder=True), "max_position_embeddings")
    return limit if tables and isinstance(limit, int) and limit > 0 else None


def max_draft_depth(target: PreTrainedModel, root_position: int, table_length: int | None) -> int | None:
    """How deep a tree may grow before its positions change what plain decoding would compute.

    Learned positions end with their table. Dynamic and long RoPE change the frequencies of the whole forward pass with
    the largest position in it, so a tree must not be the first to cross their limit.

    Args:
        target: The model that verifies.
        root_position: Position of the tree's root.
        table_length: What [`learned_positions`] says of the target.

    Returns:
        The number of levels below the root; `None` for no limit.
    """
    text_config = target.config.get_text_config(decoder=True)
    limit = table_length
    if rope := getattr(text_config, "rope_parameters", None):
        per_layer_type = [value for value in rope.values() if isinstance(value, dict)] or [rope]
        ropes = {value.get("rope_type"): value for value in per_layer_type}
        if "dynamic" in ropes:
            limit = text_config.max_position_embeddings
        elif "longrope" in ropes and root_position < ropes["longrope"]["original_max_position_embeddings"]:
            limit = ropes["longrope"]["original_max_position_embeddings"]
    return None if limit is None else max(0, limit - 1 - root_position)


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
        padding_mask: 1 for tokens and 0 for padding among the cached positions, of shape `(batch, past)`, or `None`.

    Returns:
        A mask of shape `(batch, 1, nodes, kept past + nodes)` in the target's dtype, or one per layer type, whichever
        the target's layers expect.
    """
    text_config = target.config.get_text_config(decoder=True)
    layer_types = getattr(text_config, "layer_types", None)
    sliding_window = common_value(text_config, "sliding_window")
    if layer_types is None:
        return _additive_mask(tree, cache, 0, sliding_window, padding_mask, target.dtype)
    masks = {}
    for layer_type in dict.fromkeys(layer_types):
        # The layer that the target itself would size this mask by
        is_sliding = layer_type == "sliding_attention"
        sized = (i for i, layer in enumerate(cache.layers) if hasattr(layer, "get_mask_sizes"))
        layer_idx = next((i for i in sized if cache.is_sliding[i] == is_sliding), 0)
        window = sliding_window if is_sliding else None
        masks[layer_type] = _additive_mask(tree, cache, layer_idx, window, padding_mask, target.dtype)
    return masks


def _additive_mask(
    tree: DraftTree,
    cache: Cache,
    layer_idx: int,
    window: int | None,
    padding_mask: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    depths, device = tree.depths, tree.tokens.device
    past_length = cache.get_seq_length()
    _, offset = cache.get_mask_sizes(tree.num_nodes, layer_idx)
    past = torch.arange(offset, past_length, device=device)  # (kept past,)

    sees_past = torch.ones(*depths.shape, past.numel(), dtype=torch.bool, device=device)
    sees_node = tree.ancestors
    if padding_mask is not None:
        sees_past &= padding_mask[:, None, offset:past_length].bool().to(device)
    if window is not None:
        sees_past &= past_length + depths[..., None] - past < window
        sees_node = sees_node & (depths[:, :, None] - depths[:, None, :] < window)
    allowed = torch.cat([sees_past, sees_node], dim=-1)[:, None]
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)


def check_rollback(cache: Cache) -> None:
    """Check that the layers of a cache have seen the same tokens, so that all can be rolled back by the same number.

    Args:
        cache: The target's cache after the prefill.

    Raises:
        RuntimeError: If they have not.
    """
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None and layer.keys.numel()]
    lengths = {layer.get_seq_length() for layer in layers}
    if len(lengths) > 1:
        raise RuntimeError(
            f"an FSPAD head needs a cache whose layers hold the same tokens, got lengths {sorted(lengths)}: call "
            "`generate` without `assistant_model`."
        )


def keep_accepted(cache: Cache, path: list[int], num_nodes: int) -> None:
    """Shrink a cache that ends in a whole tree to the accepted path, in place.

    Args:
        cache: The target's cache after the tree's forward pass.
        path: Indices of the accepted nodes in order, root first.
        num_nodes: Nodes of the tree.
    """
    kept = len(path)
    if path != list(range(kept)):
        for layer in cache.layers:
            for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if states is not None and states.numel():
                    tail = states[..., -num_nodes:, :]
                    tail[..., :kept, :] = tail[..., torch.tensor(path, device=states.device), :]
    # Also for 0 removed tokens: sliding layers cut back to their window here
    cache.crop(kept - num_nodes)


def stop_recording(cache: Cache) -> None:
    """Undo `activate_past_recording`, so that a returned cache behaves as after plain decoding."""
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = False


def hidden_states_of_path(
    layers: tuple[torch.Tensor | None, ...], path: list[int]
) -> list[tuple[torch.Tensor | None, ...]]:
    """Cut the hidden states of a tree into what plain decoding returns token by token.

    Args:
        layers: One tensor a layer, of shape `(batch, nodes, hidden)`, or `None` for a layer that was not asked for.
        path: Indices of the accepted nodes in order, root first.

    Returns:
        For each accepted node a tuple over layers of shape `(batch, 1, hidden)`.
    """
    return [tuple(None if layer is None else layer[:, node : node + 1] for layer in layers) for node in path]


def attentions_of_path(
    layers: tuple[torch.Tensor, ...], path: list[int], num_nodes: int, cache: Cache
) -> list[tuple[torch.Tensor, ...]]:
    """Cut the attentions of a tree into what plain decoding returns token by token.

    Args:
        layers: One tensor an attention layer, of shape `(batch, heads, nodes, kept past + nodes)`.
        path: Indices of the accepted nodes in order, root first.
        num_nodes: Nodes of the tree.
        cache: The target's cache, which knows the sliding windows.

    Returns:
        For each accepted node a tuple over layers of shape `(batch, heads, 1, keys)`.
    """
    cache_layers = cache.layers
    if len(cache_layers) != len(layers):  # layers without attention have no attentions
        cache_layers = [layer for layer in cache_layers if isinstance(layer, DynamicLayer)]
    windows = [layer.sliding_window if getattr(layer, "is_sliding", False) else None for layer in cache_layers]
    steps = []
    for step, node in enumerate(path):
        row = []
        for attentions, window in zip(layers, windows, strict=True):
            num_past = attentions.shape[-1] - num_nodes
            keys = [*range(num_past), *(num_past + ancestor for ancestor in path[: step + 1])]
            keys = keys if window is None else keys[-window:]
            row.append(attentions[:, :, node : node + 1, torch.tensor(keys, device=attentions.device)])
        steps.append(tuple(row))
    return steps
