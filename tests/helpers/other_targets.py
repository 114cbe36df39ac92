"""Tiny targets of families that `make_target` has not: most are outside of what is known to verify a tree."""

import torch
import transformers

NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA = {
    "vocab_size": 9,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT = {"vocab_size": 9, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
BERT = {
    "vocab_size": 9,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

CONFIGS = {
    "biogpt": lambda **kw: transformers.BioGptConfig(**{**BERT, "intermediate_size": 48, **NO_SPECIAL, **kw}),
    "bloom": lambda **kw: transformers.BloomConfig(
        **{"vocab_size": 9, "hidden_size": 32, "n_layer": 2, "n_head": 4, **NO_SPECIAL, **kw}
    ),
    "codegen": lambda **kw: transformers.CodeGenConfig(**{**GPT, "rotary_dim": 4, **NO_SPECIAL, **kw}),
    "cpmant": lambda **kw: transformers.CpmAntConfig(
        **{
            **{"vocab_size": 9, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "dim_head": 8},
            **{"dim_ff": 48, "prompt_types": 8, "prompt_length": 4, "position_bias_num_buckets": 16},
            **{"position_bias_max_distance": 64, "segment_types": 4, **NO_SPECIAL, **kw},
        }
    ),
    "ctrl": lambda **kw: transformers.CTRLConfig(**{**GPT, "dff": 48, **NO_SPECIAL, **kw}),
    "falcon": lambda **kw: transformers.FalconConfig(**{**BERT, "alibi": False, **NO_SPECIAL, **kw}),
    "falcon with alibi": lambda **kw: transformers.FalconConfig(
        **{**BERT, "alibi": True, "new_decoder_architecture": False, "multi_query": True, **NO_SPECIAL, **kw}
    ),
    "gpt_neo": lambda **kw: transformers.GPTNeoConfig(
        **{
            **{"vocab_size": 9, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8},
            **{"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128, **NO_SPECIAL, **kw},
        }
    ),
    "gpt_neox_japanese": lambda **kw: transformers.GPTNeoXJapaneseConfig(
        **{**BERT, "intermediate_multiple_size": 2, **NO_SPECIAL, **kw}
    ),
    "gptj": lambda **kw: transformers.GPTJConfig(**{**GPT, "rotary_dim": 4, **NO_SPECIAL, **kw}),
    "lfm2": lambda **kw: transformers.Lfm2Config(
        **{**LLAMA, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], **NO_SPECIAL, **kw}
    ),
    "mpt": lambda **kw: transformers.MptConfig(
        **{"vocab_size": 9, "d_model": 32, "n_layers": 2, "n_heads": 4, "use_cache": True, **NO_SPECIAL, **kw}
    ),
    "paligemma": lambda **kw: transformers.PaliGemmaConfig(
        text_config={**LLAMA, "model_type": "gemma", "head_dim": 8, **NO_SPECIAL, **kw},
        vision_config={
            **{"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "image_size": 16},
            **{"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "projection_dim": 32},
        },
        projection_dim=32,
        image_token_index=8,
    ),
    "phi3": lambda **kw: transformers.Phi3Config(**{**LLAMA, **NO_SPECIAL, **kw}),
    "stablelm": lambda **kw: transformers.StableLmConfig(**{**LLAMA, **NO_SPECIAL, **kw}),
    "xglm": lambda **kw: transformers.XGLMConfig(
        **{
            **{"vocab_size": 9, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
            **{"max_position_embeddings": 128, **NO_SPECIAL, **kw},
        }
    ),
}


def make_family(family, **overrides):
    """A tiny random target without special tokens.

    Args:
        family: One of `CONFIGS`.
        **overrides: Configuration fields.
    """
    torch.manual_seed(0)
    config = CONFIGS[family](**overrides)
    if family == "paligemma":
        target = transformers.PaliGemmaForConditionalGeneration(config).eval()
    else:
        target = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.dim() == 2:  # large enough for the text not to repeat itself
                parameter.normal_(0, 0.3)
    target.generation_config.pad_token_id = 0
    return target
