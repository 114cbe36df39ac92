import json

import pytest
import torch
import transformers

from fspad import FSPADConfig, FSPADModel
from helpers.models import make_target

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

# Families whose configurations name or nest their sizes in their own way
TARGET_CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4),
    "gptj": transformers.GPTJConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "opt": transformers.OPTConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, ffn_dim=40, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "bloom": transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4),
    "falcon": transformers.FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "phi (partial rotation)": transformers.PhiConfig(**SMALL, num_attention_heads=4, partial_rotary_factor=0.5),
    "phi3": transformers.Phi3Config(**SMALL, **HEADS, pad_token_id=0),
    "gemma3 (two ropes)": transformers.Gemma3TextConfig(**SMALL, **HEADS, head_dim=8),
    "gemma4 (layers of two head sizes)": transformers.Gemma4TextConfig(
        **SMALL, **HEADS, head_dim=8, global_head_dim=16
    ),
    "gemma3 (multimodal)": transformers.Gemma3Config(
        text_config={**SMALL, **HEADS, "head_dim": 8},
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    ),
    "qwen2-vl (sections)": transformers.Qwen2VLConfig(
        text_config={
            **SMALL,
            **HEADS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
        }
    ),
    "deepseek-v3 (latent attention)": transformers.DeepseekV3Config(
        **SMALL, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4
    ),
    "gpt-neox": transformers.GPTNeoXConfig(**SMALL, num_attention_heads=4),
    "mamba": transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2),
}


@pytest.mark.parametrize("name", TARGET_CONFIGS)
@torch.no_grad()
def test_every_decoder_gets_a_head_of_its_size(name):
    config = FSPADConfig.from_target(TARGET_CONFIGS[name])
    text = TARGET_CONFIGS[name].get_text_config(decoder=True)
    assert (config.vocab_size, config.hidden_size) == (50, 32)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(config, token) == getattr(text, token, None)
    head = FSPADModel(config)
    features = torch.randn(1, 5, 32)
    assert head(features=features, inputs_embeds=features).predict.shape == (1, 5, 32)


def test_encoder_decoder_targets_are_refused():
    with pytest.raises(ValueError, match="decoder-only models, got the encoder-decoder 't5'"):
        FSPADConfig.from_target(transformers.T5Config())


def test_overrides_and_target_name(tmp_path):
    target = make_target()
    config = FSPADConfig.from_target(target.config, draft_vocab_size=8, feature_sampling=False, draft_depth=2)
    assert (config.draft_vocab_size, config.feature_sampling, config.draft_depth) == (8, False, 2)
    assert config.target_model_name is None
    for name, recorded in (("someone/target", "someone/target"), (str(tmp_path), None)):
        target.config._name_or_path = name
        assert FSPADConfig.from_target(target.config).target_model_name == recorded


def test_saved_and_loaded(tmp_path):
    config = FSPADConfig.from_target(make_target().config, num_draft_tokens=13, eos_token_id=[3, 4])
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fspad"
    loaded = FSPADConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "auto_map": None} == {**config.to_dict(), "auto_map": None, "dtype": "float32"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": -1}, "hidden_size must be an integer from 1 to 65536, got -1"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "must be a multiple of num_key_value_heads"),
        ({"num_hidden_layers": 2}, "one decoder layer, got num_hidden_layers=2"),
        ({"draft_vocab_size": 101}, "draft_vocab_size must be an integer from 1 to 100, got 101"),
        ({"draft_depth": -1}, "draft_depth must be an integer from 0 to 64, got -1"),
        ({"num_draft_tokens": 0}, "num_draft_tokens must be an integer from 1 to 1024, got 0"),
        ({"draft_top_k": True}, "draft_top_k"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FSPADConfig(**{"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 4, **values})
