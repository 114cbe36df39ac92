r"""The FSPAD head: one decoder layer that drafts on the features of a target (arXiv 2408.15562).

With `e` the embedding of token t+1 and `f` the target's feature at position t:

    x                = W_in [e; f] + b
    x                = x + W_down (act(W_gate e) * W_up norm(x))                 feature sampling
    h                = x + attention(x)
    [predict; regress] = [h; h] + V_down (act(V_gate norm(h)) * V_up norm(h))    partial alignment

`predict` goes to the target's LM head and scores token t+2; `regress` stands for the feature at t+1 and is the input
of the next draft step. Embedding and LM head are the target's own and never part of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import ModelOutput

from .checkpoint import CheckpointMixin
from .configuration_fspad import FSPADConfig
from .generation_fspad import AssistedDecodingMixin
from .hook import install_hook
from .target import check_target, device_of
from .weight_files import check_draft_vocabulary


@dataclass
class FSPADOutput(ModelOutput):
    """Output of [`FSPADModel`].

    Args:
        predict: Input of the target's LM head, of shape `(batch, length, hidden)`.
        regress: Predicted features, of shape `(batch, length, hidden)`. The same tensor as `predict` without partial
            alignment.
        past_key_values: The head's own cache, if `use_cache`.
    """

    predict: torch.FloatTensor | None = None
    regress: torch.FloatTensor | None = None
    past_key_values: Cache | None = None


class GatedMLP(GradientCheckpointingLayer):
    """A gated MLP whose gate may look at another input than the rest, and whose output may have another size.

    It is what gradient checkpointing computes again: most of a head's activations are in it, and it has no cache, which
    a decoder layer would extend a second time.
    """

    def __init__(self, config: FSPADConfig, output_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, output_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, gate: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, length, hidden)` to `(batch, length, output_size)`; `gate` has the shape of `hidden_states`."""
        return self.down_proj(self.act_fn(self.gate_proj(gate)) * self.up_proj(hidden_states))


class FeatureSampling(nn.Module):
    """Fuses a token embedding and a feature; the sampled token picks the feature in the wide space of a gated MLP."""

    def __init__(self, config: FSPADConfig):
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=True)
        if config.feature_sampling:
            self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = GatedMLP(config, config.hidden_size)
        self.is_gated = config.feature_sampling

    def forward(self, inputs_embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Fuse token embeddings and features, of shape `(batch, length, hidden)` each, into one of the same shape."""
        hidden_states = self.fc(torch.cat([inputs_embeds, features], dim=-1))  # (batch, length, hidden)
        if self.is_gated:
            hidden_states = hidden_states + self.mlp(inputs_embeds, self.norm(hidden_states))
        return hidden_states


class PartialAlignmentLayer(nn.Module):
    """A Llama decoder layer without input norm that ends in two vectors, or in one without partial alignment."""

    def __init__(self, config: FSPADConfig):
        super().__init__()
        self.num_outputs = 2 if config.partial_alignment else 1
        self.self_attn = LlamaAttention(config, layer_idx=0)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config, self.num_outputs * config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **attention_kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Map `(batch, length, hidden)` to `predict` and `regress` of the same shape."""
        attention_output, _ = self.self_attn(hidden_states, **attention_kwargs)
        hidden_states = hidden_states + attention_output
        normed = self.post_attention_layernorm(hidden_states)
        outputs = hidden_states.repeat(1, 1, self.num_outputs) + self.mlp(normed, normed)
        predict, *regress = outputs.chunk(self.num_outputs, dim=-1)  # (batch, length, hidden) each
        return predict, regress[0] if regress else predict


class FSPADModel(AssistedDecodingMixin, CheckpointMixin, PreTrainedModel):
    """An FSPAD draft head, to be passed as `assistant_model` to the `generate` of its target.

    Args:
        config: Shape, variant and drafting knobs of the head.
    """

    config_class = FSPADConfig
    base_model_prefix = "model"
    main_input_name = "features"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ("FeatureSampling", "PartialAlignmentLayer")

    def __init__(self, config: FSPADConfig):
        # Once more, since fields may have been assigned after the configuration was made
        config.check()
        super().__init__(config)
        self.feature_sampling = FeatureSampling(config)
        self.layer = PartialAlignmentLayer(config)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        if config.draft_vocab_size is not None:
            self.register_buffer("draft_vocab_ids", torch.arange(config.draft_vocab_size))
        self.post_init()

    @classmethod
    def from_target(cls, target: PreTrainedModel, config: FSPADConfig | None = None) -> FSPADModel:
        """Make an untrained head with the shapes, dtype and device of a target.

        Args:
            target: Any decoder-only causal language model.
            config: Configuration of the head; by default [`FSPADConfig.from_target`].

        Returns:
            A randomly initialised head in evaluation mode.

        Raises:
            ValueError: If `config` does not fit the target, or the target is an encoder-decoder model.
        """
        config = FSPADConfig.from_target(target.config) if config is None else config
        check_target(config, target)
        # Not by `to(dtype)`, which would round the frequencies of RoPE as well
        head = cls._from_config(config, dtype=target.dtype)
        return head.to(device_of(target.get_output_embeddings())).eval()

    def forward(
        self,
        features: torch.Tensor,
        inputs_embeds: torch.Tensor,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
    ) -> FSPADOutput:
        """Predict features and logits inputs one position ahead.

        Args:
            features: Features of the target at positions t, of shape `(batch, length, hidden)`.
            inputs_embeds: The target's embeddings of the tokens at t+1, of shape `(batch, length, hidden)`.
            position_ids: Positions t, of shape `(batch, length)`; by default they continue the cache.
            attention_mask: Padding mask of shape `(batch, past + length)`, or an additive mask of shape
                `(batch, 1, length, past + length)` in the head's dtype; by default causal.
            past_key_values: The head's cache of earlier positions, extended in place.
            use_cache: Whether to return a cache.

        Returns:
            `predict` and `regress`, of shape `(batch, length, hidden)` each.

        Raises:
            ValueError: If `features` and `inputs_embeds` have different shapes, or not the head's hidden size.
        """
        if features.shape != inputs_embeds.shape or features.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"features and inputs_embeds must both have the shape (batch, length, {self.config.hidden_size}), got "
                f"{tuple(features.shape)} and {tuple(inputs_embeds.shape)}"
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past_length, past_length + features.shape[1], device=features.device)[None]

        hidden_states = self.feature_sampling(inputs_embeds, features)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        predict, regress = self.layer(
            hidden_states,
            position_embeddings=self.rotary_emb(hidden_states, position_ids),
            attention_mask=mask,
            past_key_values=past_key_values,
        )
        return FSPADOutput(predict=predict, regress=regress, past_key_values=past_key_values if use_cache else None)

    def get_input_embeddings(self) -> None:
        """A head has none: it borrows the target's. Sharding and quantisation ask."""
        return None

    def set_draft_vocabulary(self, token_ids: torch.Tensor | None) -> None:
        """Let the head score these tokens only, or all of them again. Verification stays over the full vocabulary.

        Args:
            token_ids: Distinct token ids of shape `(draft_vocab,)`, the most frequent first, so that
                `config.draft_vocab_size` can be lowered later; `None` for the target's whole vocabulary.

        Raises:
            ValueError: If an id is negative, outside of the vocabulary, or there twice.
        """
        if token_ids is None:
            self._buffers.pop("draft_vocab_ids", None)
            self.config.draft_vocab_size = None
            return
        check_draft_vocabulary(token_ids, self.config.vocab_size)
        self.register_buffer("draft_vocab_ids", token_ids.to(device=self.device, dtype=torch.long))
        self.config.draft_vocab_size = token_ids.numel()

    @property
    def active_draft_vocab_ids(self) -> torch.LongTensor | None:
        """The `config.draft_vocab_size` most frequent tokens, of shape `(draft_vocab,)`; `None` for all tokens.

        Raises:
            ValueError: If the head has fewer draft tokens than `config.draft_vocab_size`.
        """
        size = self.config.draft_vocab_size
        if size is None:
            return None
        available = getattr(self, "draft_vocab_ids", None)
        if available is None or available.numel() < size:
            raise ValueError(
                f"config.draft_vocab_size is {size}, but the head holds "
                f"{'no' if available is None else available.numel()} draft tokens: lower it, set it to None, or call "
                "`set_draft_vocabulary`."
            )
        return available[:size]


# At module level: a head that came by remote code must be savable with its code, and its import be all `generate` needs.
FSPADModel.register_for_auto_class("AutoModel")
install_hook()
