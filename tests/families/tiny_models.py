"""Tiny random models of every type that transformers can build: one rule for all, and a short table of exceptions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCAB_SIZE = 97
NUM_LAYERS = 4
WINDOW = 12
MAX_POSITIONS = 40
ROPES = ("dynamic", "longrope")
FIRST_SPECIAL = 80  # ids from here on stand for images and the like, and are in no prompt

# The value of a field wherever a configuration has it, in whatever family and however deep
FIELDS: list[tuple[Any, str]] = [
    (
        2,
        """num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k index_n_heads
        linear_num_key_heads linear_num_value_heads linear_num_heads swa_num_key_value_heads mamba_n_groups n_groups
        topk_group n_group num_expert_group num_query_groups depth depths expand
        mamba_expand num_kv_shared_layers first_k_dense_replace num_dense_layers moe_num_shared_experts n_shared_experts num_local_layers
        resampler_depth conf_num_hidden_layers num_global_layers max_num_tiles num_shared_experts vision_num_layers
        L_cycles num_layers_per_stack intermediate_multiple_size aligner_num_add_layers n_mamba_heads num_quantizers""",
    ),
    (
        NUM_LAYERS,
        """num_hidden_layers n_layer n_layers num_layers num_decoder_layers decoder_layers layers num_blocks encoder_layers
        num_encoder_layers
        num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads
        swa_num_attention_heads num_decoder_attention_heads num_encoder_attention_heads num_experts n_routed_experts
        num_local_experts moe_num_experts max_window_layers index_topk conf_num_attention_heads resampler_n_heads
        resampler_heads mamba_n_heads encoder_hash_byte_group_nb_functions zero_expert_num laurel_rank mamba_num_heads
        num_sliding_attention_heads mamba_dt_rank time_step_rank""",
    ),
    (
        16,
        """head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim kv_lora_rank linear_key_head_dim linear_head_dim
        linear_value_head_dim index_head_dim swa_head_dim global_head_dim hidden_size_per_layer_input kv_channels
        o_lora_rank mamba_d_state state_size ssm_state_size mamba_chunk_size dim_head d_kv d_head d_rel rotary_dim
        attention_head_size resampler_head_dim resampler_dim_head mm_tokens_per_image router_hidden_size adapter_rank
        image_seq_length num_centroids encoder_hash_byte_group_vocab audio_vocab_size max_inference_chunksize""",
    ),
    (24, "q_lora_rank"),
    (32, "image_size qk_head_dim mamba_d_head mamba_headdim mamba_head_dim attention_head_dim"),
    (
        48,
        """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff d_inner dim_ff dff moe_intermediate_size
        shared_expert_intermediate_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size mlp_dim
        ffn_hidden_size expert_ffn_hidden_size shared_experts_intermediate_size moe_shared_expert_intermediate_size""",
    ),
    (
        64,
        """hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim embedding_dim emb_dim dim_model
        out_hidden_size projection_dim input_embedding_size output_embedding_size projector_hidden_size lru_width
        text_hidden_size encoder_hidden_size backbone_hidden_size attention_hidden_size hidden_size_global
        vision_hidden_size decoder_hidden_size projector_input_dim projector_output_dim vision_output_dim""",
    ),
    (VOCAB_SIZE, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        MAX_POSITIONS,
        """max_position_embeddings n_positions max_seq_len context_length max_target_positions n_ctx
        model_max_length""",
    ),
    (
        WINDOW,
        """sliding_window sliding_window_size window_size attention_chunk_size attention_window_size
        local_attention keep_window_size local_attention_window_len""",
    ),
    (0.2, "initializer_range init_std"),
    (8, "patch_size num_query_tokens max_source_positions"),
    (True, "is_decoder use_cache"),
    (False, "tie_word_embeddings add_cross_attention"),
    (0, "pad_token_id"),
    (
        None,
        """bos_token_id eos_token_id sep_token_id cls_token_id forced_eos_token_id
        begin_suppress_tokens""",
    ),
]
TINY = {name: value for value, names in FIELDS for name in names.split()}
# What the rule gets wrong: fields of the text configuration by type, or of sub-configurations as "sub.field"
COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        f"{kind}_attention": {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding", "full")
    },
}
MROPE = {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "cohere_compass": {f"text_config.{name}": value for name, value in COMPASS.items()},
    "cohere_compass_text": COMPASS,
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.kv_n_heads": 2, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"] * 2, "text_config.num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 48,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "dots3_note": {
        "text_config.num_key_value_heads": 4,
        "vision_config.adapter_in_dim": 64,
        "audio_config.adapter_input_size": 64,
    },
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91, "<|visual token 000000|>": 92}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie": {"use_task_id": False},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {"rope_theta": 1e4, "mrope_section": [3, 3, 2]}},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4},
    "gemma3n": {"text_config.num_kv_shared_layers": 2},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4": {"text_config.num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 2},
    "glm46v": MROPE,
    "glm4v": MROPE,
    "glm4v_moe": {
        "text_config.rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    },
    "glm5_next": {"text_config.num_key_value_heads": 4, "text_config.index_kpool": 2},
    "glm_ocr": MROPE,
    "glmga": MROPE,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 12},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": [], "downsample_rate": "1/2"},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": MROPE | {"text_config.head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 32},
    "mistral4": {"text_config.rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    "mllama": {"vision_config.max_num_tiles": 4},
    "moshi": {"num_codebooks": 2},
    "minimax": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "mixtral": {"head_dim": 16},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "mpt": {"attn_config.attn_uses_sequence_id": False},
    "paddleocr_vl": MROPE,
    "qwen2_5_vl": MROPE,
    "qwen2_vl": MROPE,
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_5_omni_thinker": MROPE | {"vision_start_token_id": 95},
    "qwen3_omni_moe_thinker": MROPE | {"vision_start_token_id": 95},
    "qwen4_exp": {f"text_config.{name}": value for name, value in QSA.items()},
    "qwen4_exp_text": QSA,
    "step3p7": {"text_config.sliding_window": WINDOW},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 8]},
    "zamba2": {"n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True, order=True)
class TinyType:
    """A type of model that `generate` may be called on.

    Args:
        name: Its `model_type`.
        sees: Whether it is built by `AutoModelForImageTextToText` instead of `AutoModelForCausalLM`.
        rope: Kind of RoPE to give it instead of its own.
    """

    name: str
    sees: bool = False
    rope: str | None = None

    def __str__(self) -> str:
        return self.name + " (image)" * self.sees + f" ({self.rope} RoPE)" * bool(self.rope)

    @classmethod
    def parse(cls, text: str) -> TinyType:
        """The type that is written like this."""
        name, *marks = text.replace(")", "").split(" (")
        rope = next((mark.split()[0] for mark in marks if mark.endswith("RoPE")), None)
        return cls(name, "image" in marks, rope)


def all_types() -> Iterator[TinyType]:
    """Every type that can generate, causal language models first; a class that is both stands among those."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    seeing = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    yield from map(TinyType, sorted(causal))
    yield from (TinyType(name, sees=True) for name in sorted(seeing) if causal.get(name) != seeing[name])
    yield from (TinyType(name, rope=rope) for name in sorted(causal) if _has_rope(name) for rope in ROPES)


def _has_rope(name: str) -> bool:
    """Whether a type has one RoPE for all layers, which can be given another kind."""
    try:
        config = tiny_config(name)
    except Exception:  # is told as such when the type itself is built
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    return "rope_theta" in rope and "mrope_section" not in rope


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default configuration of a type, made tiny.

    Args:
        model_type: A key of `CONFIG_MAPPING`.
    """
    return _shrunk(CONFIG_MAPPING[model_type], EXCEPTIONS.get(model_type, {}))


def _shrunk(config_class: type[PreTrainedConfig], exceptions: dict[str, Any]) -> PreTrainedConfig:
    default = config_class()
    values = {name: value for name, value in default.to_dict().items() if name not in config_class.sub_configs}
    depth = next((values[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if values.get(n)), 0)
    fields = {name: _shrunk_value(config_class, name, value, depth) for name, value in values.items()}
    fields = {name: value for name, value in fields.items() if value is not ...}
    if values.get("kv_lora_rank"):  # latent attention has as many keys as queries
        fields["num_key_value_heads"] = 4
    for name in config_class.sub_configs:
        if (sub_config := getattr(default, name, None)) is not None:
            prefix = name + "."
            own = {key.removeprefix(prefix): value for key, value in exceptions.items() if key.startswith(prefix)}
            fields[name] = _shrunk(type(sub_config), own)
    return config_class(**fields | {key: value for key, value in exceptions.items() if "." not in key})


def _shrunk_value(config_class: type[PreTrainedConfig], name: str, value: Any, depth: int) -> Any:
    """The tiny value of a field; `...` to leave it to the configuration, which may derive it from others."""
    is_per_layer = isinstance(value, list) and 0 < depth == len(value)
    if name in TINY:
        tiny = TINY[name]
        if tiny is None:
            field = config_class.__dataclass_fields__.get(name)
            return None if field is None or "None" in str(field.type) else 0
        if is_per_layer:
            return [tiny] * NUM_LAYERS
        if isinstance(value, (list, tuple)):  # e.g. height and width
            return [tiny] * len(value)
        return tiny if value or isinstance(tiny, bool) else ...
    if name.endswith(("_id", "_token_index")) and type(value) is int:
        return FIRST_SPECIAL + sum(map(ord, name.removesuffix("_index").removesuffix("_id"))) % 17
    if is_per_layer:
        kinds = list(dict.fromkeys(value))
        return [kinds[i % len(kinds)] for i in range(NUM_LAYERS)]
    if name == "rope_parameters" and isinstance(value, dict):
        return _shrunk_rope(value)
    return ...


def _shrunk_rope(rope: dict[str, Any]) -> dict[str, Any]:
    rope = {name: _shrunk_rope(value) if isinstance(value, dict) else value for name, value in rope.items()}
    if "mrope_section" in rope:
        rope["mrope_section"] = [4, 2, 2]
    return rope


def build(tiny_type: TinyType, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of a type, in fp32.

    Args:
        tiny_type: The type.
        seed: Seed of the weights.
    """
    config = tiny_config(tiny_type.name)
    if tiny_type.rope is not None:
        _set_rope(config.get_text_config(decoder=True), tiny_type.rope)
    torch.manual_seed(seed)
    auto = transformers.AutoModelForImageTextToText if tiny_type.sees else transformers.AutoModelForCausalLM
    target = auto.from_config(config).eval()
    target.generation_config.pad_token_id = 0
    target.generation_config.eos_token_id = None
    with contextlib.suppress(Exception), torch.no_grad():
        target(torch.full((1, 4), 3))  # BigBird makes itself anew in its first forward pass, from random numbers
    return target


def _set_rope(text_config: PreTrainedConfig, rope_type: str) -> None:
    own = text_config.rope_parameters
    if rope_type == "dynamic":
        text_config.rope_parameters = own | {"rope_type": "dynamic", "factor": 4.0}
        return
    dim = int((getattr(text_config, "head_dim", None) or 16) * own.get("partial_rotary_factor", 1.0)) // 2
    original = MAX_POSITIONS // 2
    text_config.rope_parameters = own | {
        "rope_type": "longrope",
        "short_factor": [1.0] * dim,
        "long_factor": [1.0 + 3.0 * i / dim for i in range(dim)],
        "original_max_position_embeddings": original,
        "factor": 2.0,
    }
    text_config.original_max_position_embeddings = original
