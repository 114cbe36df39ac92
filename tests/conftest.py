"""Fixtures of all tests."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers

from helpers.hub_server import TOKEN, HubServer
from helpers.models import make_head, make_target


@pytest.fixture(autouse=True)
def _seed_and_threads():
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A stand-in of the Hub that this process uses too."""
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr("fspad.hub_cards.push.WAITS", (0, 0, 0))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("tmp")))  # where failed pushes stay
        yield server


@pytest.fixture(scope="session")
def saved_head(tmp_path_factory) -> Path:
    """A saved head, not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "head"
    make_head(make_target(), draft_vocab_size=20).save_pretrained(folder)
    return folder


@pytest.fixture
def head_folder(saved_head, tmp_path) -> Path:
    """A copy of a saved head, to be changed; without code files."""
    folder = tmp_path / "head"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((saved_head / name).read_bytes())
    return folder
