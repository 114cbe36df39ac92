"""Checkpoints of the original implementation and of EAGLE become heads that compute the same function."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, LlamaConfig
from typer.testing import CliRunner

from fspad import FSPADModel
from fspad.cli import app
from fspad.cli.convert import convert_checkpoint, convert_state_dict
from helpers.goldens import VARIANTS, read_golden
from helpers.source_checkpoints import write_source, write_target


@pytest.fixture
def target(tmp_path) -> Path:
    return write_target(tmp_path / "target")


@pytest.fixture
def eagle():
    weights, _, config = read_golden("eagle")
    return weights, config


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_head_computes_what_the_original_computed(variant, file, tmp_path, target):
    weights, golden, config = read_golden(variant)
    source = write_source(tmp_path / "source", weights, config, file)

    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "head"), "--target", str(target)])

    assert result.exit_code == 0, result.output
    head = AutoModel.from_pretrained(tmp_path / "head").eval()
    assert type(head) is FSPADModel
    assert (head.config.feature_sampling, head.config.partial_alignment) == VARIANTS[variant]
    embeddings = torch.nn.functional.embedding(golden["input_ids"][:, 1:], weights["embed_tokens.weight"])
    with torch.no_grad():
        output = head(features=golden["features"], inputs_embeds=embeddings)
    torch.testing.assert_close(output.predict, golden["predict"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.regress, golden["regress"], atol=1e-5, rtol=0)


def test_target_decides_on_vocabulary_special_tokens_and_length(eagle, tmp_path, target):
    head = convert_checkpoint(str(write_source(tmp_path / "source", *eagle)), tmp_path / "head", str(target))
    config = head.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (3, [4, 5], 6)
    assert (config.vocab_size, config.max_position_embeddings) == (211, 777)
    assert config.target_model_name is None  # a folder's path means nothing on another machine
    assert not any("embed_tokens" in name for name in load_file(tmp_path / "head" / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype, eagle, tmp_path, target):
    weights, config = eagle
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    convert_checkpoint(str(write_source(tmp_path / "source", weights, config)), tmp_path / "head", str(target))
    assert AutoModel.from_pretrained(tmp_path / "head").dtype == dtype
    assert {tensor.dtype for tensor in load_file(tmp_path / "head" / "model.safetensors").values()} == {dtype}


@pytest.mark.parametrize("variant", ["fspad", "eagle"])
def test_missing_bias_of_the_input_layer_becomes_zeros(variant):
    weights, _, config = read_golden(variant)
    name = "fc.fc.bias" if variant == "fspad" else "fc.bias"
    del weights[name]
    head = convert_state_dict(weights, config, LlamaConfig(**config))
    torch.testing.assert_close(head.feature_sampling.fc.bias.detach(), torch.zeros(64))


def test_attention_biases_without_output_bias_are_kept(eagle):
    weights, config = eagle
    for letter, size in (("q", 64), ("k", 32), ("v", 32)):
        weights[f"layers.0.self_attn.{letter}_proj.bias"] = torch.randn(size)
    head = convert_state_dict(weights, config, LlamaConfig(**config))
    torch.testing.assert_close(head.layer.self_attn.q_proj.bias.detach(), weights["layers.0.self_attn.q_proj.bias"])
    torch.testing.assert_close(head.layer.self_attn.o_proj.bias.detach(), torch.zeros(64))


def test_names_may_carry_a_prefix(eagle):
    weights, config = eagle
    prefixed = {f"model.{name}": tensor for name, tensor in weights.items()}
    heads = [convert_state_dict(w, config, LlamaConfig(**config)) for w in (weights, prefixed)]
    for plain, other in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        torch.testing.assert_close(plain, other)
    with pytest.raises(ValueError, match="twice"):
        convert_state_dict({**weights, **prefixed}, config, LlamaConfig(**config))


def test_old_rope_settings_are_understood(eagle):
    weights, config = eagle
    config |= {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    head = convert_state_dict(weights, config, LlamaConfig(**config))
    rope = head.config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("linear", 500000.0, 2.0)


def test_length_from_which_dynamic_rope_scales_is_the_checkpoints(eagle):
    weights, config = eagle
    source = {**config, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    target = LlamaConfig(**{**config, "max_position_embeddings": 8192})
    assert convert_state_dict(weights, source, target).config.max_position_embeddings == 2048


def test_missing_and_unexpected_weights_are_named(eagle):
    weights, config = eagle
    del weights["layers.0.self_attn.k_proj.weight"]
    weights["midlayer.fc.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"missing: \['layers\.0\.self_attn\.k_proj\.weight'\]") as error:
        convert_state_dict(weights, config, LlamaConfig(**config))
    assert "midlayer.fc.weight" in str(error.value)


def test_wrong_shape_is_named_with_both_shapes(eagle):
    weights, config = eagle
    weights["layers.0.mlp.up_proj.weight"] = torch.zeros(161, 64)
    with pytest.raises(ValueError, match=r"up_proj.weight: expected \(160, 64\), got \(161, 64\)"):
        convert_state_dict(weights, config, LlamaConfig(**config))


def test_mixed_dtypes_are_refused(eagle):
    weights, config = eagle
    weights["fc.weight"] = weights["fc.weight"].half()
    with pytest.raises(ValueError, match=r"torch\.float16, torch\.float32"):
        convert_state_dict(weights, config, LlamaConfig(**config))


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 128), ("vocab_size", 300)])
def test_target_of_another_size_is_refused_with_both_numbers(field, value, eagle, tmp_path):
    source = write_source(tmp_path / "source", *eagle)
    target = write_target(tmp_path / "other", **{field: value})
    arguments = ["convert", str(source), str(tmp_path / "head"), "--target", str(target)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert f"{field}={eagle[1][field]}" in result.output
    assert f"{field}={value}" in result.output
    assert not (tmp_path / "head").exists()


def test_nothing_is_overwritten(eagle, tmp_path, target):
    source = write_source(tmp_path / "source", *eagle)
    with pytest.raises(FileExistsError, match="new or empty"):
        convert_checkpoint(str(source), source, str(target))
