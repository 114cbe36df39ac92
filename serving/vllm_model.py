"""The head as a draft model of vLLM's method `eagle`, sharded as vLLM shards its models.

The pair that `forward` returns is what vLLM's proposer wants: what goes to the logits, and the feature of the next draft step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsEagle
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, get_draft_quant_config, maybe_prefix

DRAFT_TO_TARGET = "d2t"


class GatedMLP(nn.Module):
    """A gated MLP whose gate may look at another input than the rest, and whose output may have another size."""

    def __init__(self, vllm_config: VllmConfig, output_size: int, prefix: str):
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        sizes = (config.hidden_size, config.intermediate_size)
        options = {"bias": False, "quant_config": get_draft_quant_config(vllm_config), "return_bias": False}
        self.gate_proj = ColumnParallelLinear(*sizes, prefix=f"{prefix}.gate_proj", **options)
        self.up_proj = ColumnParallelLinear(*sizes, prefix=f"{prefix}.up_proj", **options)
        self.down_proj = RowParallelLinear(
            config.intermediate_size, output_size, prefix=f"{prefix}.down_proj", **options
        )
        self.act_fn = get_act_fn(config.hidden_act)

    def forward(self, gate: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(tokens, hidden)` to `(tokens, output_size)`; `gate` has the shape of `hidden_states`."""
        return self.down_proj(self.act_fn(self.gate_proj(gate)) * self.up_proj(hidden_states))


class FeatureSampling(nn.Module):
    """Fuses a token embedding and a feature; the token picks the feature in the wide space of a gated MLP."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        self.fc = make_fusion(vllm_config, f"{prefix}.fc")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(vllm_config, config.hidden_size, f"{prefix}.mlp")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map embeddings beside features, of shape `(tokens, 2 * hidden)`, to `(tokens, hidden)`."""
        hidden_states = self.fc(inputs)
        embeds = inputs[:, : hidden_states.shape[-1]]
        return hidden_states + self.mlp(embeds, self.post_attention_layernorm(hidden_states))


class PartialAlignmentLayer(nn.Module):
    """A Llama decoder layer without input norm that ends in two vectors, or in one without partial alignment."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        self.num_outputs = 2 if config.partial_alignment else 1
        self.self_attn = LlamaAttention(
            config=config,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=get_draft_quant_config(vllm_config),
            bias=config.attention_bias,
            bias_o_proj=config.attention_bias,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(vllm_config, self.num_outputs * config.hidden_size, f"{prefix}.mlp")

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map `(tokens, hidden)` to predict and regress of the same shape."""
        hidden_states = hidden_states + self.self_attn(positions=positions, hidden_states=hidden_states)
        normed = self.post_attention_layernorm(hidden_states)
        outputs = hidden_states.repeat(1, self.num_outputs) + self.mlp(normed, normed)
        predict, *regress = outputs.chunk(self.num_outputs, dim=-1)
        return predict, regress[0] if regress else predict


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "hidden_states": 0})
class FspadModel(nn.Module):
    """Token embedding, fusion and layer of a head. vLLM puts the target's embedding in the place of this one."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={f".{name}_proj": (".qkv_proj", name) for name in ("q", "k", "v")}
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        # Attention layers of target and head share a cache manager, which tells them apart by their number
        number = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        # Gemma's embedding layer scales in transformers, where heads are trained, and the model around it in vLLM
        is_scaled = vllm_config.model_config.hf_text_config.model_type.startswith("gemma")
        scale = torch.tensor(config.hidden_size**0.5 if is_scaled else 1.0)
        self.register_buffer("embed_scale", scale, persistent=False)
        fuse = FeatureSampling if config.feature_sampling else make_fusion
        self.fc = fuse(vllm_config, maybe_prefix(prefix, "fc"))
        self.layers = nn.ModuleList([PartialAlignmentLayer(vllm_config, maybe_prefix(prefix, f"layers.{number}"))])

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings as the target's layers get them, of shape `(tokens, hidden)`."""
        embeds = self.embed_tokens(input_ids)
        return embeds * self.embed_scale.to(embeds.dtype)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict one position ahead.

        Args:
            input_ids: Tokens t+1, of shape `(tokens,)`.
            positions: Positions t, of shape `(tokens,)`.
            hidden_states: Features at t, of shape `(tokens, hidden)`.

        Returns:
            Predict and regress, of shape `(tokens, hidden)` each.
        """
        inputs = torch.cat([self.embed(input_ids), hidden_states], dim=-1)
        return self.layers[0](positions, self.fc(inputs))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights by their original names."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


class EagleFspadLlamaForCausalLM(nn.Module, SupportsEagle):
    """An exported FSPAD head. vLLM sets `lm_head`, which is the target's.

    Raises:
        ValueError: With pipeline parallel, where no process has both of what the head borrows: the embedding is with the
            first layers, and the LM head with the last.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        if (stages := get_pp_group().world_size) > 1:
            raise ValueError(
                f"expected pipeline_parallel_size 1, since a head borrows embedding and LM head of its target, got {stages}: "
                "use tensor parallel alone, or serve without a head."
            )
        self.config = vllm_config.speculative_config.draft_model_config.hf_config
        self.model = FspadModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        # Target's ids of the tokens that the head scores, and those of this process with their rows of the LM head
        self.token_ids: torch.Tensor | None = None
        self._places = self._rows = None

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, of shape `(tokens, hidden)`."""
        return self.model.embed(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict one position ahead, as [`FspadModel.forward`].

        Raises:
            NotImplementedError: If embeddings come in the place of tokens, as those of pictures do.
        """
        if inputs_embeds is not None:
            raise NotImplementedError("an FSPAD head drafts for text: got embeddings in the place of tokens")
        return self.model(input_ids, positions, hidden_states)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits over the target's vocabulary, of shape `(tokens, vocab)`; minus infinity for what the head does not score."""
        if self.token_ids is None:
            return self.logits_processor(self.lm_head, hidden_states)
        logits = hidden_states.new_full((hidden_states.shape[0], self.config.vocab_size), float("-inf"))
        logits[:, self.token_ids] = self._draft_logits(hidden_states)
        return logits

    def _draft_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of the draft vocabulary, each computed where its row of the LM head is, of shape `(tokens, draft_vocab)`."""
        if not isinstance(self.lm_head.quant_method, UnquantizedEmbeddingMethod):
            return self.logits_processor(self.lm_head, hidden_states)[:, self.token_ids]
        if self._rows is None:
            shard = self.lm_head.shard_indices
            start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
            self._places = ((self.token_ids >= start) & (self.token_ids < end)).nonzero().squeeze(1)
            self._rows = self.lm_head.weight[self.token_ids[self._places] - start]
        logits = nn.functional.linear(hidden_states, self._rows)
        if get_tensor_model_parallel_world_size() == 1:
            return logits
        scattered = logits.new_zeros(hidden_states.shape[0], self.token_ids.numel())
        scattered[:, self._places] = logits
        return tensor_model_parallel_all_reduce(scattered)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load an exported head.

        Args:
            weights: By their original names; embedding and LM head are the target's and not among them.
        """
        layers = []
        for name, weight in weights:
            if name == DRAFT_TO_TARGET:
                ids = weight + torch.arange(weight.numel())
                self.token_ids = ids.to(self.model.layers[0].post_attention_layernorm.weight.device)
            else:
                layers.append((f"model.{name}", weight))
        return AutoWeightsLoader(self).load_weights(layers) | {"model.embed_tokens.weight"}


def make_fusion(vllm_config: VllmConfig, prefix: str) -> ReplicatedLinear:
    """The linear layer from an embedding beside a feature, `2 * hidden`, to `hidden`."""
    config = vllm_config.speculative_config.draft_model_config.hf_config
    return ReplicatedLinear(
        2 * config.hidden_size,
        config.hidden_size,
        bias=True,
        quant_config=get_draft_quant_config(vllm_config),
        prefix=prefix,
        return_bias=False,
    )
