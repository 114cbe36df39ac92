"""Fixtures of all tests. Nothing heavy is imported before they run: one process collects, others run the tests."""

import copy
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# What users have set is not what is tested. Read when huggingface_hub and torch are imported, and by child processes.
for name in list(os.environ):
    if name.startswith(("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_", "ACCELERATE_")):
        del os.environ[name]
HF_HOME = tempfile.mkdtemp(prefix="fspad-tests-")
os.environ |= {"HF_HOME": HF_HOME, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # for the stand-in of the Hub


def pytest_configure() -> None:
    """With `FSPAD_TEST_DEVICE=cuda`, make tensors and models on an accelerator wherever a test names no device."""
    if device := os.environ.get("FSPAD_TEST_DEVICE"):
        import torch

        torch.set_default_device(device)


def pytest_unconfigure() -> None:
    """Remove what Hugging Face libraries have cached."""
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed_and_threads() -> None:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _few_near_ties() -> Iterator[None]:
    yield
    if comparing := sys.modules.get("helpers.comparing"):
        comparing.check_excused()


@pytest.fixture
def hub(monkeypatch, tmp_path_factory) -> Iterator:
    """A stand-in of the Hub that this process uses too."""
    import huggingface_hub
    import transformers

    from helpers.hub_server import TOKEN, HubServer

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
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # for PEFT, which looks every time
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("tmp")))  # where failed pushes stay
        yield server


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32, not to be changed, and its tokenizer."""
    import torch

    from fspad.bench.smollm2 import load_smollm2

    return load_smollm2(torch.float32)


@pytest.fixture
def smollm2_is_loaded_once(smollm2, monkeypatch) -> None:
    """What the test runs gets copies of the model that is here: to read its file takes longer than most tests."""

    def load_smollm2(dtype=None):
        return copy.deepcopy(smollm2[0]).to(dtype), smollm2[1]

    for module in ("fspad.bench.smollm2", "fspad.cli.loading"):
        monkeypatch.setattr(f"{module}.load_smollm2", load_smollm2)


@pytest.fixture(scope="session")
def saved_head(tmp_path_factory) -> Path:
    """A saved head, not to be changed."""
    from helpers.models import make_head, make_target

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
