"""How a target verifies drafts: whether it can, how far, its forward pass, and what is kept of it afterwards."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .position_limits import PositionLimits
from .target import FeatureTap, device_of
from .tree import DraftTree
from .tree_attention import attention_windows, attentions_of_path, hidden_states_of_path, tree_attention_mask
from .verification_mode import VerificationMode, check_rollback, decide_by_probe, decide_by_rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Inputs with one value a token, of which every drafted token gets that of the token before it
PER_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


@dataclass
class Verified:
    """What a forward pass of the target says about a tree.

    Args:
        logits: Of shape `(batch, nodes, vocab)`; after a prefill of the last position only, `(batch, 1, vocab)`.
        features: What entered the LM head, of shape `(batch, nodes, hidden)`; after a prefill of the whole prompt.
        outputs: Everything that the target returned.
    """

    logits: torch.Tensor
    features: torch.Tensor
    outputs: ModelOutput


class Verifier:
    """The target of one call of `generate`, with its cache and inputs.

    Use it as a context manager: while it is open the target's features are recorded, and afterwards the cache is as
    plain decoding leaves it.

    Args:
        target: The model whose `generate` was called.
        mode: How drafts are verified: `TREE` or `CHAIN`.
        generation_config: The options of `generate`.
        model_kwargs: The model inputs that `generate` prepared, with a cache.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        mode: VerificationMode,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        self.target = target
        self.mode = mode
        self.generation_config = generation_config
        self.model_kwargs = dict(model_kwargs)
        if "logits_to_keep" in self.model_kwargs:
            self.model_kwargs["logits_to_keep"] = 0  # all rows, of which the tap passes on those that are needed
        self.limits = PositionLimits(target)
        self.hidden_states: tuple = ()
        self.attentions: tuple = ()
        self.tap = FeatureTap(target)

    @classmethod
    def decide(cls, target: PreTrainedModel, model_kwargs: dict[str, Any]) -> tuple[VerificationMode, str | None]:
        """Decide how a target can verify drafts exactly: by what is known of it, else by a trial on its own weights.

        Args:
            target: The model that verifies.
            model_kwargs: The model inputs that `generate` prepared.

        Returns:
            The mode, and the reason when it is not the tree.
        """
        cache, padding_mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        mode, reason = decide_by_rule(target, cache)
        if mode is not None:
            return mode, reason
        has_padding = padding_mask is not None and bool((padding_mask == 0).any())
        return decide_by_probe(cls, target, cache, reason, bool(model_kwargs.get("output_attentions")), has_padding)

    def __enter__(self) -> Verifier:
        self.tap.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.tap.__exit__(*exc)
        # Undone, so that a returned cache behaves as after plain decoding
        for layer in getattr(self.cache, "layers", ()):
            if hasattr(layer, "record_past"):
                layer.record_past = False

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """The context that transformers opens between prefill and end; releases before 5.2x have none."""
        optimize = getattr(self.target, "_optimize_model_for_decode", contextlib.nullcontext)
        with optimize():
            yield

    @property
    def cache(self) -> Cache:
        """The target's cache."""
        return self.model_kwargs["past_key_values"]

    def prefill(self, input_ids: torch.LongTensor) -> Verified:
        """Run the target on the prompt.

        Args:
            input_ids: The prompt, of shape `(1, length)`.

        Raises:
            ValueError: If the target has other features than one vector a token.
        """
        with self.tap.record(logits_to_keep=1) as recorded:
            outputs = self.target._prefill(input_ids, self.generation_config, self.model_kwargs)
        if any(features.dim() != 3 or features.shape[0] != input_ids.shape[0] for features in recorded):
            raise ValueError(
                f"an FSPAD head needs one feature a token, of shape (batch, length, hidden), at the LM head of its "
                f"target, got {[tuple(features.shape) for features in recorded]} from {type(self.target).__name__}: call "
                "`generate` without `assistant_model`."
            )
        verified = Verified(outputs.logits[:, -1:], torch.cat(recorded, dim=1), outputs)
        self.record(outputs)
        self._advance(outputs, 1)
        check_rollback(self.cache)
        self.cache.activate_past_recording()
        self.limits.start(self.model_kwargs)
        if self.mode is VerificationMode.TREE and self._one_token_inputs(input_ids).get("position_ids") is None:
            # The target takes positions from its cache, where the nodes of a tree stand elsewhere
            self.mode = VerificationMode.CHAIN
            # Or it counts those of its tokens that are no padding, which is another number where a draft is such a token
            if any(hasattr(module, "create_position_ids_from_input_ids") for module in self.target.modules()):
                self.mode = VerificationMode.PLAIN
        return verified

    def max_depth(self, num_tokens: int) -> int | None:
        """Levels of drafts below the root that do not change what plain decoding computes; `None` for no limit.

        Args:
            num_tokens: Tokens so far, the root included.
        """
        return (
            0
            if self.mode is VerificationMode.PLAIN
            else self.limits.max_depth(num_tokens, self.cache.get_seq_length())
        )

    def run(self, tree: DraftTree, input_ids: torch.LongTensor) -> Verified:
        """Run the target on all nodes of a tree.

        Args:
            tree: Root, then drafts.
            input_ids: The tokens so far, ending in the root, of shape `(1, length)`.
        """
        if self.mode is VerificationMode.CHAIN and tree.num_nodes > 1:
            model_inputs = self._chain_inputs(tree, input_ids)
        else:
            model_inputs = self._one_token_inputs(input_ids)
            # Processors are slower without a mask where heads share keys, in half precision: torch 2.13 takes 1.3 times as
            # long for a token of a bf16 target after 700 others. In fp32 it is the mask that costs 2%
            is_half_on_cpu = self.target.device.type == "cpu" and self.target.dtype.itemsize == 2
            wants_mask = tree.num_nodes > 1 or is_half_on_cpu
            computes_anew = model_inputs.get("past_key_values") is not self.cache
            if self.mode is VerificationMode.TREE and wants_mask and not computes_anew:
                self._widen(model_inputs, tree)
        with self.tap.record() as recorded:
            outputs = self.target(**model_inputs, return_dict=True)
        # A target that computes its cache anew returns more rows than the tree has
        rows = slice(-tree.num_nodes, None)
        return Verified(outputs.logits[:, rows], recorded[0][:, rows], outputs)

    def keep(self, outputs: ModelOutput, path: list[int], nodes: torch.LongTensor, num_nodes: int) -> None:
        """Shrink the cache, which ends in a whole tree, to the accepted path, and move on.

        Args:
            outputs: What the target returned for the tree.
            path: Indices of the accepted nodes in order, root first.
            nodes: The same as a tensor, of shape `(accepted,)`.
            num_nodes: Nodes of the tree.
        """
        had = self.cache
        self._advance(outputs, len(path))
        if self.cache is not had:
            self.cache.activate_past_recording()
        keep_path(self.cache, path, nodes, num_nodes)
        self.limits.advance(len(path))

    def record(self, outputs: ModelOutput, path: list[int] | None = None, num_nodes: int = 1) -> None:
        """Keep hidden states and attentions, if asked for, one entry a token as in plain decoding.

        Args:
            outputs: What the target returned.
            path: Indices of the accepted nodes in order; `None` after the prefill.
            num_nodes: Nodes of the tree.
        """
        config = self.generation_config
        if not config.return_dict_in_generate:
            return
        as_it_is = path is None or num_nodes == 1
        if config.output_hidden_states:
            layers = outputs.hidden_states
            self.hidden_states += (layers,) if as_it_is else tuple(hidden_states_of_path(layers, path))
        if config.output_attentions:
            layers = outputs.attentions
            if not as_it_is and layers:
                text_config = self.target.config.get_text_config(decoder=True)
                windows = attention_windows(text_config, self.cache, len(layers))
                self.attentions += tuple(attentions_of_path(layers, path, num_nodes, windows))
            else:
                self.attentions += (layers,) * (1 if path is None else len(path))

    def _one_token_inputs(self, input_ids: torch.LongTensor) -> dict[str, Any]:
        """What the target itself prepares to go on after the last token."""
        return self.target.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self.model_kwargs)

    def _widen(self, model_inputs: dict[str, Any], tree: DraftTree) -> None:
        """Make the inputs of one token those of the nodes of a tree."""
        model_inputs["input_ids"] = tree.tokens
        # Families count positions in ways of their own, so the tree only adds its depths
        root_position = model_inputs["position_ids"][..., -1:]
        model_inputs["position_ids"] = root_position + tree.depths.to(root_position.device)
        for name in PER_TOKEN_INPUTS:
            if model_inputs.get(name) is not None:
                model_inputs[name] = model_inputs[name][..., -1:].expand_as(tree.tokens)
        padding_mask = self.model_kwargs.get("attention_mask")
        mask = tree_attention_mask(tree, self.cache, self.target, padding_mask)
        device = device_of(self.target.get_input_embeddings())
        if isinstance(mask, dict):
            model_inputs["attention_mask"] = {name: value.to(device) for name, value in mask.items()}
        else:
            model_inputs["attention_mask"] = mask.to(device)

    def _chain_inputs(self, tree: DraftTree, input_ids: torch.LongTensor) -> dict[str, Any]:
        kwargs = self._extended(ModelOutput(), tree.num_nodes - 1)
        return self.target.prepare_inputs_for_generation(
            torch.cat([input_ids, tree.tokens[:, 1:]], dim=1), next_sequence_length=tree.num_nodes, **kwargs
        )

    def _advance(self, outputs: ModelOutput, num_new_tokens: int) -> None:
        self.model_kwargs = self._extended(outputs, num_new_tokens)

    def _extended(self, outputs: ModelOutput, num_new_tokens: int) -> dict[str, Any]:
        """The model inputs with room for new tokens: one at a time, because plain decoding repeats the last type."""
        kwargs = copy.copy(self.model_kwargs)
        for _ in range(num_new_tokens):
            kwargs = self.target._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
        return kwargs


def keep_path(cache: Cache, path: list[int], nodes: torch.LongTensor, num_nodes: int) -> None:
    """Shrink a cache that ends in a whole tree to the accepted path, in place.

    Args:
        cache: The target's cache after the tree's forward pass.
        path: Indices of the accepted nodes in order, root first.
        nodes: The same as a tensor, of shape `(accepted,)`.
        num_nodes: Nodes of the tree.
    """
    kept = len(path)
    if path != list(range(kept)):
        on_device: dict[torch.device, torch.Tensor] = {}
        for layer in cache.layers:
            for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if states is not None and states.numel():
                    index = on_device.setdefault(states.device, nodes.to(states.device))
                    tail = states[..., -num_nodes:, :]
                    tail[..., :kept, :] = tail.index_select(-2, index)
    # Also for 0 removed tokens: sliding layers cut back to their window here
    cache.crop(kept - num_nodes)
