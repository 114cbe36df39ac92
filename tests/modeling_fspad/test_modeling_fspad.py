import pytest
import torch
from transformers import AutoConfig, AutoModel, LlamaConfig

from fspad import FSPADConfig, FSPADModel
from fspad.target import embed_tokens
from helpers.goldens import VARIANTS, load_golden
from helpers.models import make_target


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_predictions_are_those_of_the_original(variant, attention):
    golden = load_golden(variant)
    golden.head.set_attn_implementation(attention)
    embeds = embed_tokens(golden.target, golden.tensors["input_ids"][:, 1:])
    output = golden.head(features=golden.tensors["features"], inputs_embeds=embeds)
    torch.testing.assert_close(output.predict, golden.tensors["predict"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.regress, golden.tensors["regress"], atol=1e-5, rtol=0)
    assert (output.predict is output.regress) == (golden.metadata["partial_alignment"] == "False")


@torch.no_grad()
def test_cache_continues_a_sequence():
    head = FSPADModel.from_target(make_target())
    features, embeds = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    whole = head(features=features, inputs_embeds=embeds)
    assert whole.past_key_values is None
    first = head(features=features[:, :5], inputs_embeds=embeds[:, :5], use_cache=True)
    rest = head(features=features[:, 5:], inputs_embeds=embeds[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.predict, rest.predict], dim=1), whole.predict, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_is_invisible():
    head = FSPADModel.from_target(make_target())
    features, embeds = torch.randn(1, 6, 32), torch.randn(1, 6, 32)
    alone = head(features=features[:, 2:], inputs_embeds=embeds[:, 2:])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    padded = head(
        features=features,
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
    )
    torch.testing.assert_close(padded.regress[:, 2:], alone.regress, atol=1e-5, rtol=0)


def test_wrong_shapes_are_named():
    head = FSPADModel.from_target(make_target())
    with pytest.raises(ValueError, match=r"shape \(batch, length, 32\), got \(1, 4, 16\)"):
        head(features=torch.randn(1, 4, 16), inputs_embeds=torch.randn(1, 4, 16))
    with pytest.raises(ValueError, match=r"\(1, 4, 32\) and \(1, 5, 32\)"):
        head(features=torch.randn(1, 4, 32), inputs_embeds=torch.randn(1, 5, 32))


def test_rope_that_would_change_while_it_runs_is_not_taken_over():
    rope = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 4.0}
    head = FSPADModel.from_target(make_target(rope_parameters=rope, max_position_embeddings=24))
    assert head.config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}


def test_rope_scaling_of_the_target_is_used():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    target = make_target(rope_parameters=rope)
    head = FSPADModel.from_target(target)
    assert head.config.rope_parameters == target.config.rope_parameters
    torch.testing.assert_close(head.rotary_emb.inv_freq, target.model.rotary_emb.inv_freq)
    plain = FSPADModel.from_target(make_target())
    assert not torch.equal(head.rotary_emb.inv_freq, plain.rotary_emb.inv_freq)


def test_head_is_registered_with_the_auto_classes():
    assert AutoConfig.for_model("fspad").__class__ is FSPADConfig
    config = FSPADConfig.from_target(LlamaConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=64))
    assert type(AutoModel.from_config(config)) is FSPADModel
