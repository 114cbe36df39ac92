"""Weights of a head may come from anybody: what is read of them before anything is allocated, and what is refused."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from fspad import FSPADModel
from helpers.models import edit_json, make_head, make_target


class Malicious:
    """Writes a file while it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}, {"weights_only": False}])
@pytest.mark.parametrize("loader", [FSPADModel, AutoModel])
def test_pickled_weights_are_not_loaded(loader, options, head_folder, tmp_path, monkeypatch):
    (head_folder / "model.safetensors").unlink()
    torch.save({"fc.weight": Malicious(tmp_path / "mark")}, head_folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises(OSError, match=r"safetensors files only; `fspad convert`"):
        loader.from_pretrained(head_folder, **options)
    assert not (tmp_path / "mark").exists()


def write_index(folder: Path, file: str) -> None:
    names = list(load_file(folder / "model.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", ["float32", None])
def test_an_index_cannot_name_a_pickle(dtype, head_folder, monkeypatch):
    edit_json(head_folder / "config.json", dtype=dtype)
    write_index(head_folder, "weights.bin")
    torch.save(load_file(head_folder / "model.safetensors"), head_folder / "weights.bin")
    (head_folder / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises(ValueError, match=r"expected weights in safetensors files, got .*weights\.bin"):
        FSPADModel.from_pretrained(head_folder)


@pytest.mark.parametrize("absolute", [True, False])
def test_an_index_cannot_point_out_of_the_folder(absolute, head_folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    write_index(head_folder, str(outside) if absolute else "../outside.safetensors")
    (head_folder / "model.safetensors").rename(outside)
    with pytest.raises(ValueError, match="index points elsewhere"):
        FSPADModel.from_pretrained(head_folder)


def test_sharded_heads_are_loaded(tmp_path):
    head = make_head(make_target())
    head.save_pretrained(tmp_path, max_shard_size="10KB")
    assert not (tmp_path / "model.safetensors").exists()
    loaded = FSPADModel.from_pretrained(tmp_path)
    for name, value in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_distributed_checkpoints_are_refused(head_folder):
    (head_folder / "model.safetensors").rename(head_folder / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="got a distributed checkpoint"):
        FSPADModel.from_pretrained(head_folder)


# Sizes within the limits that the weights do not have: hundreds of gigabytes, if they were allocated
LIES = {
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_attention_heads": 2**10,
    "num_key_value_heads": 4,
    "head_dim": 2**12,
    "draft_vocab_size": 97,
    "attention_bias": True,
    "feature_sampling": False,
    "partial_alignment": False,
}


@pytest.mark.parametrize("field", LIES)
def test_sizes_that_the_weights_do_not_have_are_refused(field, head_folder):
    edit_json(head_folder / "config.json", **{field: LIES[field]})
    with pytest.raises(
        ValueError, match=r"does not match its config\.json: .*(instead of|weights \['.*\.(bias|weight))"
    ):
        AutoModel.from_pretrained(head_folder)


@pytest.mark.parametrize("kept", [0, 1])
def test_nothing_is_allocated_for_missing_weights(kept, head_folder, monkeypatch):
    weights = load_file(head_folder / "model.safetensors")
    save_file(dict(list(weights.items())[:kept]), head_folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(head_folder / "config.json", hidden_size=2**16, intermediate_size=2**18)
    monkeypatch.setattr(FSPADModel, "_move_missing_keys_from_meta_to_device", lambda *args: pytest.fail("allocated"))
    with pytest.raises(ValueError, match="missing weights"):
        FSPADModel.from_pretrained(head_folder)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (torch.arange(20) + 90, "distinct token ids from 0 to 96"),
        (torch.arange(20) - 1, "distinct token ids from 0 to 96"),
        (torch.zeros(20, dtype=torch.long), "1 of them distinct"),
        (torch.arange(20.0), "floats of shape"),
    ],
)
def test_draft_vocabularies_of_the_file_are_checked(token_ids, message, head_folder):
    weights = load_file(head_folder / "model.safetensors")
    weights["draft_vocab_ids"] = token_ids
    save_file(weights, head_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        FSPADModel.from_pretrained(head_folder)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5])
def test_truncated_files_are_named(kept, head_folder):
    file = head_folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
        FSPADModel.from_pretrained(head_folder)


@pytest.mark.parametrize("length", [2**20 + 1, 2**40, 2**63, 2**64 - 1])
def test_long_headers_are_refused_before_they_are_read(length, head_folder):
    file = head_folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
        FSPADModel.from_pretrained(head_folder)


def test_many_names_make_a_short_message(head_folder):
    weights = {f"weight{i}": torch.zeros(0) for i in range(5000)}
    save_file(
        {**load_file(head_folder / "model.safetensors"), **weights},
        head_folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"unknown weights .*5000 in all") as error:
        FSPADModel.from_pretrained(head_folder)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.complex64])
def test_other_dtypes_are_refused(dtype, head_folder):
    weights = load_file(head_folder / "model.safetensors")
    weights["feature_sampling.fc.weight"] = weights["feature_sampling.fc.weight"].to(dtype)
    save_file(weights, head_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"feature_sampling\.fc\.weight is|damaged"):
        FSPADModel.from_pretrained(head_folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "nothing"])
def test_files_that_are_none_are_refused_at_once(kind, name, head_folder):
    (head_folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(head_folder / name)
    else:
        (head_folder / name).symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(ValueError, match="got a pipe, a device or a broken link"):
        FSPADModel.from_pretrained(head_folder)


def test_a_large_config_is_not_read(head_folder):
    with (head_folder / "config.json").open("a") as file:
        file.write(" " * 2**20)
    with pytest.raises(ValueError, match=r"expected .* to be the small file of a head"):
        FSPADModel.from_pretrained(head_folder)


@pytest.mark.parametrize("content", ["null", "[]", "5", '{"a":' * 100_000, "{"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_is_refused(name, content, head_folder):
    if name != "config.json":
        (head_folder / "model.safetensors").unlink()
    (head_folder / name).write_text(content)
    with pytest.raises((OSError, ValueError), match=r"damaged|not a valid JSON|Can't find|holds a dictionary"):
        FSPADModel.from_pretrained(head_folder)
