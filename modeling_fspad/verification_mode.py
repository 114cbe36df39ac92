"""Which targets can verify a tree, which only a chain, and which must decode plainly: by rule, else by a one-time probe."""

from __future__ import annotations

import inspect
import threading
import weakref
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.utils import logging

from .target import device_of
from .target_config import common_value
from .tree import DraftTree

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .verification import Verifier

logger = logging.get_logger(__name__)

# Layers that use the keys and values of others have an empty cache layer, which older releases do not know
SHARED_LAYER = getattr(cache_utils, "DummyLayer", DynamicLayer)
# What is known to verify a tree exactly, and what a chain, if transformers makes the masks. Anything else is probed.
TREE_LAYER_TYPES = {"full_attention", "sliding_attention"}
TREE_CACHE_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer, SHARED_LAYER}
TREE_ATTENTION = {"eager", "sdpa"}
CHAIN_LAYER_TYPES = TREE_LAYER_TYPES | {"chunked_attention", "conv"}
# What can be rolled back token by token. Anything else gets plain decoding.
CHAIN_CACHE_LAYERS = (DynamicLayer, LinearAttentionLayer, SHARED_LAYER)

# Beyond so many tokens attention may change, and a probe must be longer than that to see it
_SPANS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size")
# Of attention to a selection of keys, which depends on whatever else is in the forward pass
_SELECTIONS = ("index_topk", "keep_window_size")
_LONGEST_PROBE = 4096
_PROBE_LENGTH = 12
# The largest difference of two logits, by the standard deviation of all: rounding, and what a wrong mask is far above
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}

_lock = threading.Lock()
_probed: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple, VerificationMode]] = weakref.WeakKeyDictionary()


class VerificationMode(Enum):
    """How drafts are verified."""

    TREE = "tree"
    CHAIN = "chain"
    PLAIN = "plain decoding"


def decide_by_rule(target: PreTrainedModel, cache: Cache | None) -> tuple[VerificationMode | None, str | None]:
    """Decide by what is known of a target.

    Args:
        target: The model that verifies.
        cache: The cache that `generate` prepared for it.

    Returns:
        The mode, `None` if it takes a probe to know, and the reason when it is not the tree.
    """
    text_config = target.config.get_text_config(decoder=True)
    name = type(target).__name__
    layer_types = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    if target._is_stateful or layer_types & {"linear_attention", "hybrid", "hybrid_sliding"}:
        return VerificationMode.PLAIN, f"{name} has a recurrent state that cannot be rolled back"
    if "reference_sliding_attention" in layer_types:
        return VerificationMode.PLAIN, f"{name} slides a window over its answer alone, which cannot be rolled back"
    forward_arguments = inspect.signature(target.forward).parameters
    if hasattr(target.forward, "_torchdynamo_orig_callable"):
        return (
            VerificationMode.PLAIN,
            f"the forward pass of {name} is compiled, and its features cannot be read inside",
        )
    if any(type(module).__module__.startswith("torch.ao.nn.quantized") for module in target.modules()):
        return VerificationMode.PLAIN, f"layers of {name} quantize the activations of all tokens together"
    if "past_key_values" not in forward_arguments:
        return VerificationMode.PLAIN, f"{name} has no cache"
    if "prepare_inputs_for_generation" in vars(target):
        # PEFT does this for prompt and prefix tuning, whose virtual tokens have no ids, embeddings or positions here
        return VerificationMode.PLAIN, f"a wrapper of {name} adds virtual tokens to its inputs"
    if common_value(text_config, "cross_attention_layers"):
        return VerificationMode.PLAIN, f"{name} keeps image states in its cache"
    if any(isinstance(common_value(text_config, selection), int) for selection in _SELECTIONS):
        return VerificationMode.PLAIN, f"{name} attends to a selection of keys, which drafts would change"
    if type(cache) is not DynamicCache:
        return VerificationMode.PLAIN, f"{type(cache).__name__} cannot be rolled back"
    cache_layers = {type(layer) for layer in cache.layers} or {DynamicLayer}
    if not (all(issubclass(layer, CHAIN_CACHE_LAYERS) for layer in cache_layers) and _is_croppable(cache)):
        return VerificationMode.PLAIN, f"the cache of {name} cannot be rolled back"

    # Models outside of the attention interface derive positions or masks from cache slots, some of them in silence
    if not ("position_ids" in forward_arguments and target._supports_attention_backend):
        return None, f"{name} is not known to verify a tree exactly"
    has_window = isinstance(common_value(text_config, "sliding_window"), int) or layer_types == {"full_attention"}
    if not (layer_types <= TREE_LAYER_TYPES and cache_layers <= TREE_CACHE_LAYERS and has_window):
        is_known = layer_types <= CHAIN_LAYER_TYPES and cache_layers <= TREE_CACHE_LAYERS | {LinearAttentionLayer}
        reason = f"{name} has layers that are not known to verify a tree exactly"
        return (VerificationMode.CHAIN if is_known else None), reason
    if (attention := text_config._attn_implementation) not in TREE_ATTENTION:
        return VerificationMode.CHAIN, f"the attention implementation {attention!r} takes no tree mask"
    if getattr(cache, "offloading", False):
        return VerificationMode.CHAIN, "the cache is offloaded"
    return VerificationMode.TREE, None


def _is_croppable(cache: Cache) -> bool:
    # A layer of convolutions cannot tell before the prefill, and releases before 5.2x never do
    is_empty = cache.get_seq_length() == 0
    return all(
        getattr(layer, "is_croppable", True) or (is_empty and type(layer) is LinearAttentionLayer)
        for layer in cache.layers
    )


def decide_by_probe(
    verifier_class: type[Verifier],
    target: PreTrainedModel,
    cache: Cache,
    reason: str | None,
    output_attentions: bool,
    has_padding: bool,
) -> tuple[VerificationMode, str | None]:
    """Try on the target's own weights what is not known of it. Once for each attention implementation and option.

    Args:
        verifier_class: [`~fspad.verification.Verifier`].
        target: The model that verifies.
        cache: The cache that `generate` prepared for it.
        reason: Why it is not known to verify a tree.
        output_attentions: Whether attentions are asked for, for which some targets compute in another way.
        has_padding: Whether there is padding before the prompt.

    Returns:
        The mode, and the reason when it is not the tree.
    """
    text_config = target.config.get_text_config(decoder=True)
    attention, offloading = text_config._attn_implementation, bool(getattr(cache, "offloading", False))
    key = (attention, offloading, output_attentions, has_padding)
    with _lock:
        known = _probed.setdefault(target, {})
        if key not in known:
            can_tree = (
                attention in TREE_ATTENTION
                and not offloading
                and "position_ids" in inspect.signature(target.forward).parameters
                and {type(layer) for layer in cache.layers} <= TREE_CACHE_LAYERS
                and not _spans(text_config)
            )
            modes = (VerificationMode.TREE, VerificationMode.CHAIN) if can_tree else (VerificationMode.CHAIN,)
            tried = (mode for mode in modes if _is_exact(verifier_class, target, mode, output_attentions, has_padding))
            known[key] = next(tried, VerificationMode.PLAIN)
    mode = known[key]
    if mode is VerificationMode.TREE:
        return mode, None
    if mode is VerificationMode.PLAIN:
        reason = f"a forward pass over several tokens of {type(target).__name__} is not known to be exact"
    return mode, reason


def _spans(text_config: PreTrainedConfig) -> list[int]:
    values = (common_value(text_config, name) for name in _SPANS)
    return [value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0]


@torch.no_grad()
def _is_exact(
    verifier_class: type[Verifier],
    target: PreTrainedModel,
    mode: VerificationMode,
    output_attentions: bool,
    has_padding: bool,
) -> bool:
    """Whether several tokens at once give the logits of one at a time, and leave a cache that goes on in the same way."""
    text_config = target.config.get_text_config(decoder=True)
    length = max([_PROBE_LENGTH, *(span + 6 for span in _spans(text_config))])
    limit = common_value(text_config, "max_position_embeddings")
    if length > _LONGEST_PROBE or (isinstance(limit, int) and 0 < limit < length + 8):
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randint(text_config.vocab_size, (length + 4,), generator=generator, device="cpu").tolist()
    prompt, (root, first, second, last) = drawn[:length], drawn[length:]
    other = (first + 1) % text_config.vocab_size
    if mode is VerificationMode.TREE:  # a path with distractors before, beside and behind it
        tree = ([root, other, first, second, second, other], [0, 0, 0, 1, 2, 4])
        path = [0, 2, 4]
    else:
        tree, path = ([root, first, second, other], [0, 0, 1, 2]), [0, 1, 2]
    device = device_of(target.get_input_embeddings())
    input_ids = torch.tensor([[0] * 3 * has_padding + prompt], device=device)
    options = (output_attentions, 3 * has_padding)
    try:
        # As a chain, whose single tokens get the inputs of plain decoding
        singles = [([token], [0]) for token in (root, first, second, last)]
        expected = _probe(verifier_class, target, VerificationMode.CHAIN, input_ids, singles, [[0]] * 4, options)
        got = _probe(verifier_class, target, mode, input_ids, [tree, ([last], [0])], [path, [0]], options)
    except Exception as error:  # whatever an unknown model raises, it cannot verify this way
        logger.debug("%s cannot verify a %s: %s", type(target).__name__, mode.value, error)
        return False
    error = (got - expected).abs().amax() / expected.std()
    return bool(error < _TOLERANCE.get(target.dtype, 0.05))


def _probe(
    verifier_class: type[Verifier],
    target: PreTrainedModel,
    mode: VerificationMode,
    input_ids: torch.LongTensor,
    trees: list[tuple[list[int], list[int]]],
    paths: list[list[int]],
    options: tuple[bool, int],
) -> torch.Tensor:
    """The logits along a path through some trees, one after the other, in float32, of shape `(tokens, vocab)`."""
    output_attentions, padding = options
    model_kwargs: dict[str, Any] = {
        "past_key_values": DynamicCache(config=target.config.get_text_config(decoder=True)),
        "use_cache": True,
    }
    arguments = inspect.signature(target.forward).parameters
    if "attention_mask" in arguments:
        model_kwargs["attention_mask"] = torch.ones_like(input_ids)
        model_kwargs["attention_mask"][:, :padding] = 0
    if "position_ids" in arguments:
        model_kwargs["position_ids"] = target._prepare_position_ids_for_generation(input_ids, model_kwargs)
    if not padding:
        model_kwargs.pop("attention_mask", None)
    if target._supports_logits_to_keep():
        model_kwargs["logits_to_keep"] = 0
    if output_attentions:
        model_kwargs["output_attentions"] = True
    logits = []
    with verifier_class(target, mode, GenerationConfig(), model_kwargs) as verifier:
        verifier.prefill(input_ids)
        for (tokens, parents), path in zip(trees, paths, strict=True):
            tree = DraftTree([tokens], [parents], input_ids.device)
            if verifier.mode is not mode and tree.num_nodes > 1:
                raise ValueError("the target takes positions from its cache")
            input_ids = torch.cat([input_ids, tree.tokens[:, :1]], dim=1)
            verified = verifier.run(tree, input_ids)
            nodes = torch.tensor(path, device=input_ids.device)
            verifier.keep(verified.outputs, path, nodes, tree.num_nodes)
            logits.append(verified.logits[0, path].float().cpu())
            input_ids = torch.cat([input_ids, tree.tokens[:, path[1:]]], dim=1)
    return torch.cat(logits)


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
