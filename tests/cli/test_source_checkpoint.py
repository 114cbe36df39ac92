"""Checkpoints as they are published: every layout converts and computes what its authors' head computes."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel
from typer.testing import CliRunner

from fspad.cli import app
from fspad.cli.convert import convert_checkpoint
from fspad.cli.source_checkpoint import layer_fields, load_weights, read_config
from helpers.goldens import read_golden
from helpers.source_checkpoints import make_eagle_weights, run_eagle, write_source, write_target

SIZES = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
}
OLD = {"hidden_act": "silu", "max_position_embeddings": 2048, "torch_dtype": "float16", "rms_norm_eps": 1e-6}
EXTRA = {
    "embed_tokens.weight": torch.zeros(211, 64),
    "lm_head.weight": torch.zeros(211, 64),
    "layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8, dtype=torch.float64),
}
# By the head whose layout it is: fields of `config.json`, arguments of the weights, whether the input layer has a bias
LAYOUTS = {
    "EAGLE-Vicuna-7B-v1.3": ({"model_type": "llama"}, {}, True),
    "EAGLE-llama2-chat-70B": ({"model_type": "llama", "num_key_value_heads": 2}, {"kv_heads": 2}, True),
    "EAGLE-LLaMA3-Instruct-8B": (
        {"model_type": "llama", "num_key_value_heads": 2, "rope_theta": 500000.0, "bias": False},
        {"kv_heads": 2},
        False,
    ),
    "EAGLE-mixtral-instruct-8x7B": (
        {"model_type": "mixtral", "rope_theta": 1e6, "num_local_experts": 8, "bias": False},
        {},
        False,
    ),
    "EAGLE-Qwen2-7B-Instruct": ({"model_type": "qwen2", "rope_theta": 1e6, "qkv_bias": True}, {"biases": "qkv"}, True),
    "a head for Mistral": (
        {"model_type": "mistral", "sliding_window": 16, "num_key_value_heads": 2},
        {"kv_heads": 2},
        True,
    ),
    "a head for Qwen3": (
        {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 2},
        {"kv_heads": 2, "head_dim": 32},
        True,
    ),
}


def write_layout(folder: Path, name: str, files: str, extra: dict[str, torch.Tensor] = EXTRA) -> tuple[dict, dict]:
    """Write a checkpoint in a published layout; returns its configuration and its weights."""
    fields, arguments, has_bias = LAYOUTS[name]
    config, weights = {**SIZES, **OLD, **fields}, make_eagle_weights(**arguments)
    if has_bias:
        weights["fc.bias"] = torch.linspace(-1, 1, 64)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    everything = {**weights, **extra}
    if files == "safetensors":
        save_file(everything, folder / "model.safetensors")
    elif files == "bin":
        torch.save(everything, folder / "pytorch_model.bin")
    else:
        suffix = files.removeprefix("sharded ")
        names, shards = sorted(everything), {}
        for i, part in enumerate((names[::2], names[1::2])):
            shard = f"model-0000{i + 1}-of-00002.{suffix}"
            tensors = {key: everything[key] for key in part}
            save_file(tensors, folder / shard) if suffix == "safetensors" else torch.save(tensors, folder / shard)
            shards |= dict.fromkeys(part, shard)
        stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
        (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return config, weights


def convert(source: object, destination: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["convert", str(source), str(destination), *options])
    assert result.exit_code == 0, result.output
    return result.output


def assert_computes_the_same(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> None:
    head = AutoModel.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(1)
    embeddings, features = torch.randn(2, 40, 64, generator=generator)
    head_dim = config.get("head_dim", 16)
    expected = run_eagle(
        weights, embeddings, features, head_dim, config.get("rope_theta", 10000.0), config["rms_norm_eps"]
    )
    with torch.no_grad():
        output = head(features=features[None], inputs_embeds=embeddings[None])
    torch.testing.assert_close(output.predict[0], expected, atol=1e-5, rtol=1e-5)
    assert output.regress is output.predict


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_published_layout_converts(name, tmp_path):
    config, weights = write_layout(tmp_path / "source", name, "bin")
    convert(tmp_path / "source", tmp_path / "head", "--target", str(write_target(tmp_path / "target")))
    assert_computes_the_same(tmp_path / "head", config, weights)


@pytest.mark.parametrize("files", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_every_kind_of_files_converts(files, tmp_path):
    config, weights = write_layout(tmp_path / "source", "EAGLE-Vicuna-7B-v1.3", files)
    convert(tmp_path / "source", tmp_path / "head", "--target", str(write_target(tmp_path / "target")))
    assert_computes_the_same(tmp_path / "head", config, weights)


def test_checkpoints_and_heads_of_the_hub(hub, tmp_path):
    from huggingface_hub import HfApi

    config, weights = write_layout(tmp_path / "source", "EAGLE-Vicuna-7B-v1.3", "sharded bin")
    api = HfApi()
    api.create_repo("user/eagle")
    commit = api.upload_folder(repo_id="user/eagle", folder_path=tmp_path / "source")
    target = ("--target", str(write_target(tmp_path / "target")))
    convert("user/eagle", tmp_path / "head", "--revision", commit.oid, *target)
    assert_computes_the_same(tmp_path / "head", config, weights)
    AutoModel.from_pretrained(tmp_path / "head").push_to_hub("user/head")
    result = CliRunner().invoke(app, ["export", "user/head", str(tmp_path / "server"), "--revision", "main"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "server" / "model.safetensors").is_file()


def test_other_layers_are_refused(tmp_path):
    """EAGLE-3 and norms of queries compute something else, and are not taken for what they are not."""
    target = write_target(tmp_path / "target")
    for number, name in enumerate(("midlayer.hidden_norm.weight", "layers.0.self_attn.q_norm.weight", "t2d")):
        extra = torch.ones(16, dtype=torch.bool if name == "t2d" else torch.float32)
        write_layout(tmp_path / f"{number}", "EAGLE-Vicuna-7B-v1.3", "safetensors", {name: extra})
        with pytest.raises(ValueError, match=f"unexpected: .*{name}"):
            convert_checkpoint(str(tmp_path / f"{number}"), tmp_path / "head", str(target))
    assert not (tmp_path / "head").exists()


@pytest.fixture
def eagle():
    weights, _, config = read_golden("eagle")
    return weights, config


@pytest.fixture
def target(tmp_path) -> Path:
    return write_target(tmp_path / "target")


class Malicious:
    """Writes a file while it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_runs_code_is_refused_and_not_run(zipped, eagle, tmp_path, target):
    trace = tmp_path / "trace"
    source = write_source(tmp_path / "source", {}, eagle[1])
    (source / "model.safetensors").unlink()
    payload = {"fc.weight": Malicious(trace)}
    pickle.loads(pickle.dumps(payload, protocol=2))
    assert trace.exists()  # it does run where pickles are trusted
    trace.unlink()
    if zipped:
        torch.save(payload, source / "pytorch_model.bin")
    else:
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(ValueError, match="wants to run code"):
        convert_checkpoint(str(source), tmp_path / "head", str(target))
    assert not trace.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_file_is_refused_and_named(file, eagle, tmp_path):
    source = write_source(tmp_path / "source", *eagle, file)
    content = (source / file).read_bytes()
    (source / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        load_weights(str(source))


@pytest.mark.parametrize(
    "odd",
    [
        torch.eye(64).to_sparse(),
        torch.empty(64, 64, device="meta"),
        torch.zeros(1).expand(2**20, 2**20),
        torch.zeros(64, 64).to(torch.float8_e4m3fn),
        torch.zeros(64, 64, dtype=torch.complex64),
    ],
    ids=["sparse", "meta", "expanded", "float8", "complex"],
)
def test_tensors_of_other_kinds_are_refused(odd, eagle, tmp_path):
    weights, config = eagle
    source = write_source(tmp_path / "source", {**weights, "fc.weight": odd}, config, "pytorch_model.bin")
    with pytest.raises(ValueError, match="dense tensors"):
        load_weights(str(source))
    # torch would load all of them
    assert isinstance(torch.load(source / "pytorch_model.bin", weights_only=True), dict)


@pytest.mark.parametrize("is_new", [True, False])
def test_pickles_that_fill_the_memory_are_not_loaded(is_new, eagle, tmp_path, monkeypatch):
    """torch lets a pickle of a few bytes call `bytearray`."""
    source = write_source(tmp_path / "source", {}, eagle[1], "pytorch_model.bin")
    torch.save({"fc.weight": Filling()}, source / "pytorch_model.bin", _use_new_zipfile_serialization=is_new)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"holds other things than dense tensors: .*bytearray"):
        load_weights(str(source))


class Filling:
    """A million bytes, made while it is unpickled."""

    def __reduce__(self):
        return bytearray, (10**6,)


def test_older_pickles_of_torch_are_read(eagle, tmp_path):
    source = write_source(tmp_path / "source", {}, eagle[1], "pytorch_model.bin")
    torch.save(eagle[0], source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert load_weights(str(source)).keys() == eagle[0].keys() - {"embed_tokens.weight"}


def test_compressed_pickles_are_refused(eagle, tmp_path):
    source = write_source(tmp_path / "source", *eagle, "pytorch_model.bin")
    with zipfile.ZipFile(source / "pytorch_model.bin") as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(source / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in entries.items():
            new.writestr(name, content)
    with pytest.raises(ValueError, match="compressed entries"):
        load_weights(str(source))


@pytest.mark.parametrize("content", [{"model": {}}, [1], {5: torch.zeros(1)}])
def test_pickle_without_state_dict_is_refused(content, eagle, tmp_path):
    source = write_source(tmp_path / "source", content, eagle[1], "pytorch_model.bin")
    with pytest.raises(ValueError, match="no state dict"):
        load_weights(str(source))


@pytest.mark.parametrize("draft_to_target", [torch.zeros(3, 3, dtype=torch.int64), torch.tensor(1), torch.zeros(5)])
def test_draft_vocabularies_that_are_none_are_refused(draft_to_target, eagle, tmp_path, target):
    source = write_source(tmp_path / "source", {**eagle[0], "d2t": draft_to_target}, eagle[1])
    with pytest.raises(ValueError, match="expected the tensor d2t to hold one integer for each"):
        convert_checkpoint(str(source), tmp_path / "head", str(target))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "expected a dictionary"),
        ({}, "weight_map"),
        ({"weight_map": None}, "weight_map"),
        ({"weight_map": {"fc.weight": 5}}, "weight_map"),
        ({"weight_map": {"fc.weight": "../outside.bin"}}, "names of .bin files beside"),
        ({"weight_map": {"fc.weight": "model.safetensors"}}, "names of .bin files beside"),
        ({"weight_map": {f"w{i}": f"{i}.bin" for i in range(99)}}, "at most 64 shards"),
        ({"weight_map": {"fc.weight": "missing.bin"}}, "download it again"),
    ],
)
def test_broken_indexes_are_refused(index, message, eagle, tmp_path):
    source = write_source(tmp_path / "source", *eagle)
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_weights(str(source))


def test_missing_files_and_other_model_types_are_named(eagle, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        read_config(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"expected one of model\.safetensors"):
        load_weights(str(tmp_path))
    with pytest.raises(ValueError, match="'gpt2'"):
        layer_fields({**eagle[1], "model_type": "gpt2"})


def test_files_that_are_none_do_not_hang(eagle, tmp_path):
    source = write_source(tmp_path / "source", *eagle)
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")
    with pytest.raises(ValueError, match="got a pipe"):
        read_config(str(source))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 0},
        {"hidden_size": 10**12},
        {"hidden_size": "64"},
        {"max_position_embeddings": None},
        {"head_dim": "x"},
        {"rope_scaling": [1]},
        {"rope_scaling": {"type": "mrope"}},
        {"rope_theta": "x"},
        {"rms_norm_eps": -1},
    ],
    ids=str,
)
def test_values_out_of_their_range_are_refused(fields, eagle):
    with pytest.raises(ValueError, match="must be"):
        layer_fields({**eagle[1], **fields})


def test_fields_that_are_not_used_do_nothing(eagle, tmp_path, target):
    """`num_labels` alone makes transformers build a dictionary of that size."""
    config = {
        **eagle[1],
        "num_labels": 10**9,
        "quantization_config": {"quant_method": "gptq"},
        "auto_map": {"AutoModel": "x.Y"},
    }
    convert_checkpoint(str(write_source(tmp_path / "source", eagle[0], config)), tmp_path / "head", str(target))
