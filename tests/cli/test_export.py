"""Heads in the layout of servers: there and back again, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from typer.testing import CliRunner

from fspad import FSPADConfig, FSPADModel
from fspad.cli import app
from fspad.cli.convert import convert_checkpoint
from fspad.cli.export import export_head
from helpers.goldens import VARIANTS, read_golden
from helpers.source_checkpoints import write_source, write_target


def run(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def assert_same(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_original_checkpoint_comes_back(variant, tmp_path):
    weights, _, config = read_golden(variant)
    weights = {name: tensor.half() for name, tensor in weights.items()}
    source = write_source(tmp_path / "source", weights, config)
    run("convert", source, tmp_path / "head", "--target", write_target(tmp_path / "target"))

    saved = "feature_sampling={}, partial_alignment={}, dtype=float16".format(*VARIANTS[variant])
    assert saved in run("export", tmp_path / "head", tmp_path / "server")

    assert {path.name for path in (tmp_path / "server").iterdir()} == {"config.json", "model.safetensors"}
    del weights["embed_tokens.weight"]
    assert_same(load_file(tmp_path / "server" / "model.safetensors"), weights)
    exported = json.loads((tmp_path / "server" / "config.json").read_text())
    assert exported["architectures"] == ["EagleFspadLlamaForCausalLM"]
    assert (exported["model_type"], exported["num_hidden_layers"], exported["fc_bias"]) == ("llama", 1, True)
    same = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "rope_theta",
        "vocab_size",
    )
    assert {name: exported[name] for name in same} == {name: config[name] for name in same}


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_head_comes_back(variant, rope, tmp_path):
    feature_sampling, partial_alignment = VARIANTS[variant]
    target = write_target(tmp_path / "target", rope_parameters=rope)
    config = FSPADConfig.from_target(
        AutoConfig.from_pretrained(target),
        feature_sampling=feature_sampling,
        partial_alignment=partial_alignment,
        attention_bias=True,
        draft_depth=3,
        num_draft_tokens=7,
        draft_top_k=4,
        target_model_name="somebody/target",
        target_revision="abc",
    )
    head = FSPADModel(config).bfloat16()
    head.set_draft_vocabulary(torch.randperm(211)[:50])
    head.save_pretrained(tmp_path / "head")

    export_head(tmp_path / "head", tmp_path / "server")
    again = convert_checkpoint(str(tmp_path / "server"), tmp_path / "again", str(target))

    assert_same(again.state_dict(), head.state_dict())
    ignored = ("_name_or_path", "architectures", "dtype", "auto_map")
    before, after = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (head.config, again.config))
    assert after == before


def test_what_vllm_reads_by_itself(tmp_path):
    config = FSPADConfig.from_target(
        AutoConfig.from_pretrained(write_target(tmp_path / "target")), feature_sampling=False, partial_alignment=False
    )
    head = FSPADModel(config)
    for name, bias in (("plain", 0.0), ("biased", 0.5)):
        torch.nn.init.constant_(head.feature_sampling.fc.bias, bias)
        head.save_pretrained(tmp_path / name)
        export_head(tmp_path / name, tmp_path / f"{name}-server")
    plain, biased = (
        json.loads((tmp_path / f"{name}-server" / "config.json").read_text()) for name in ("plain", "biased")
    )
    assert (plain["architectures"], plain["fc_bias"]) == (["EagleLlamaForCausalLM"], False)
    assert (biased["architectures"], biased["fc_bias"]) == (["EagleFspadLlamaForCausalLM"], True)
    assert "fc.bias" not in load_file(tmp_path / "plain-server" / "model.safetensors")
    again = convert_checkpoint(str(tmp_path / "plain-server"), tmp_path / "again", str(tmp_path / "target"))
    assert_same(again.state_dict(), FSPADModel.from_pretrained(tmp_path / "plain").state_dict())


def test_lowered_draft_vocabulary_is_exported_as_it_is_used(tmp_path):
    head = FSPADModel(FSPADConfig.from_target(AutoConfig.from_pretrained(write_target(tmp_path / "target"))))
    head.set_draft_vocabulary(torch.tensor([7, 3, 100, 2]))
    head.config.draft_vocab_size = 3
    head.save_pretrained(tmp_path / "head")
    export_head(tmp_path / "head", tmp_path / "server")
    assert load_file(tmp_path / "server" / "model.safetensors")["d2t"].tolist() == [7, 2, 98]
    exported = json.loads((tmp_path / "server" / "config.json").read_text())
    assert (exported["draft_vocab_size"], exported["architectures"]) == (3, ["EagleFspadLlamaForCausalLM"])


def test_checkpoints_need_a_target_and_nothing_is_overwritten(tmp_path):
    weights, _, config = read_golden("eagle")
    source = write_source(tmp_path / "source", weights, config)
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "head")])
    assert result.exit_code == 1
    assert "expected --target" in result.output
    head = FSPADModel(FSPADConfig.from_target(AutoConfig.from_pretrained(write_target(tmp_path / "target"))))
    head.save_pretrained(tmp_path / "head")
    with pytest.raises(FileExistsError, match="new or empty"):
        export_head(tmp_path / "head", source)


def test_each_command_names_the_other(tmp_path):
    weights, _, config = read_golden("eagle")
    source = write_source(tmp_path / "source", weights, config)
    target = write_target(tmp_path / "target")
    FSPADModel(FSPADConfig.from_target(AutoConfig.from_pretrained(target))).save_pretrained(tmp_path / "head")
    for options in ([], ["--target", str(target)]):
        result = CliRunner().invoke(app, ["convert", str(tmp_path / "head"), str(tmp_path / "out"), *options])
        assert result.exit_code == 1
        assert f"`fspad export {tmp_path / 'head'} {tmp_path / 'out'}`" in result.output
        assert len(result.output.splitlines()) == 1
    result = CliRunner().invoke(app, ["export", str(source), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "no head could be loaded" in result.output
    assert not (tmp_path / "out").exists()
