"""Adapters may come from anybody: loaded only when they are named, and checked before anything is allocated."""

import json
import os
import shutil
import time
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from fspad import FSPADModel
from helpers.models import edit_json, make_head, make_target


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a `head` and an `adapter` of it."""
    head = make_head(make_target())
    head.save_pretrained(tmp_path / "head")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(FSPADModel.from_pretrained(tmp_path / "head"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path


@torch.no_grad()
def predict(head):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    features, embeddings = torch.randn(2, 1, 5, 32, generator=generator)
    return head.eval()(features=features, inputs_embeds=embeddings).predict


def test_an_adapter_that_is_named_is_loaded(folder):
    head = FSPADModel.from_pretrained(folder / "head")
    before = predict(head)
    head.load_adapter(folder / "adapter")
    assert not torch.allclose(predict(head), before, atol=1e-2)
    again = FSPADModel.from_pretrained(folder / "head")
    wrapped = peft.PeftModel.from_pretrained(again, folder / "adapter")
    torch.testing.assert_close(predict(wrapped), predict(head))
    for load in (AutoModel.from_pretrained, FSPADModel.from_pretrained):
        torch.testing.assert_close(predict(load(folder / "adapter")), predict(head))


def test_a_second_adapter_is_loaded_and_one_of_the_hub(folder, hub):
    api = HfApi()
    api.create_repo("user/adapter")
    commit = api.upload_folder(repo_id="user/adapter", folder_path=folder / "adapter")
    head = FSPADModel.from_pretrained(folder / "head")
    head.load_adapter(folder / "adapter", adapter_name="first")
    head.load_adapter("user/adapter", adapter_name="second")
    head.load_adapter("user/adapter", adapter_name="third", adapter_kwargs={"revision": commit.oid})
    assert set(head.peft_config) == {"first", "second", "third"}


def put_beside(folder: Path) -> None:
    for path in (folder / "adapter").glob("adapter*"):
        shutil.copy(path, folder / "head")


@pytest.mark.parametrize("base", ["elsewhere", None, "somebody/else"])
def test_an_adapter_beside_a_head_is_refused(base, folder):
    put_beside(folder)
    edit_json(folder / "head" / "adapter_config.json", base_model_name_or_path=base)
    for load in (AutoModel.from_pretrained, FSPADModel.from_pretrained):
        with pytest.raises(ValueError, match=r"got adapter_config\.json beside it"):
            load(folder / "head")


def test_an_adapter_beside_a_head_on_the_hub_is_refused(folder, hub, monkeypatch):
    """transformers follows the name of another model there, even if it is a folder of this machine."""
    api = HfApi()
    make_head(make_target(), seed=1).save_pretrained(folder / "other")
    put_beside(folder)
    for repo, base in (("user/one", str(folder / "other")), ("user/two", "user/one")):
        edit_json(folder / "head" / "adapter_config.json", base_model_name_or_path=base)
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path=folder / "head")
        for load in (AutoModel.from_pretrained, FSPADModel.from_pretrained):
            with pytest.raises(ValueError, match=r"got adapter_config\.json beside it|beside it in user/one"):
                load(repo)


def test_an_adapter_of_the_hub_does_not_say_which_folders_are_read(folder, hub):
    edit_json(folder / "adapter" / "adapter_config.json", base_model_name_or_path=str(folder / "head"))
    api = HfApi()
    api.create_repo("user/adapter")
    api.upload_folder(repo_id="user/adapter", folder_path=folder / "adapter")
    for load in (AutoModel.from_pretrained, FSPADModel.from_pretrained):
        with pytest.raises(ValueError, match="to name the Hub id of its head"):
            load("user/adapter")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8_000_000}, "r must be an integer from 1 to 1024"),
        ({"r": 0}, "r must be an integer"),
        ({"r": True}, "r must be an integer"),
        ({"r": 5}, "to have the shape"),
        ({"target_modules": "(((a+)+)+)+$"}, "target_modules must be 'all-linear' or a list"),
        ({"target_modules": [f"m{i}" for i in range(100_000)]}, "a list of at most 64 names"),
        ({"target_modules": []}, "target_modules must be"),
        ({"rank_pattern": {"(.*)*fc": 8_000_000}}, "expected a plain LoRA, got .*rank_pattern"),
        ({"alpha_pattern": {"(.*)*fc": 2}}, "expected a plain LoRA, got .*alpha_pattern"),
        ({"exclude_modules": "(((a+)+)+)+$"}, "expected a plain LoRA"),
        ({"modules_to_save": ["layer"]}, "expected a plain LoRA"),
        ({"use_dora": True}, "expected a plain LoRA"),
        ({"kasa_config": {}}, "expected a plain LoRA, got .*kasa_config"),
        ({"use_bdlora": {}}, "expected a plain LoRA"),
        ({"task_type": "x" * 5000}, "task_type must be one line"),
        ({"target_modules": ["x" * 5000]}, "target_modules must be"),
        ({"peft_type": "VERA"}, "peft_type LORA, got 'VERA'"),
        ({"lora_alpha": 1e300}, "lora_alpha must be"),
        ({"bias": "all"}, "bias 'none'"),
        ({"init_lora_weights": "eva"}, "init_lora_weights must be true or false"),
    ],
    ids=str,
)
def test_what_an_adapter_may_not_ask_for(fields, message, folder):
    edit_json(folder / "adapter" / "adapter_config.json", **fields)
    head = FSPADModel.from_pretrained(folder / "head")
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message) as error:
        head.load_adapter(folder / "adapter")
    assert time.perf_counter() - start < 2
    assert len(str(error.value)) < 600
    assert not head._hf_peft_config_loaded, "something was injected already"


def test_weights_of_an_adapter_are_compared_with_the_head(folder):
    file = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    for changed, message in (
        ({name: torch.zeros(4, 2**12)}, "to have the shape"),
        ({"base_model.model.nowhere.lora_A.weight": torch.zeros(4, 32)}, "expected LoRA weights of the head's linear"),
        ({name: weights[name].to(torch.float8_e4m3fn)}, "got others in"),
    ):
        save_file({**weights, **changed}, file)
        with pytest.raises(ValueError, match=message):
            FSPADModel.from_pretrained(folder / "head").load_adapter(folder / "adapter")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        FSPADModel.from_pretrained(folder / "head").load_adapter(folder / "adapter")


@pytest.mark.parametrize("content", ["null", "[]", "5", '{"a":' * 100_000, "{"])
def test_damaged_configurations_of_adapters_are_refused(content, folder):
    (folder / "adapter" / "adapter_config.json").write_text(content)
    with pytest.raises((OSError, ValueError), match=r"damaged|not a valid JSON"):
        FSPADModel.from_pretrained(folder / "head").load_adapter(folder / "adapter")


def test_pipes_in_the_place_of_adapters_do_not_hang(folder):
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="got a pipe"):
        FSPADModel.from_pretrained(folder / "head").load_adapter(folder / "adapter")


def test_peft_configs_of_the_caller_are_taken(folder):
    """A configuration in memory is the caller's own, and no stranger's."""
    head = FSPADModel.from_pretrained(folder / "head")
    config = peft.LoraConfig(r=4, target_modules=r".*\.fc")
    head.add_adapter(config)
    assert [name for name, _ in head.named_parameters() if "lora_A" in name]
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
