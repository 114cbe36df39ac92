"""Lets a target load the head of a repository by itself, for `generate(..., custom_generate=REPO, trust_remote_code=True)`.

transformers runs `custom_generate/generate.py` of the repository, which is a copy of this file. It stands alone there, so
it imports nothing from its siblings. The head is loaded from where the file came from: the repository that it was pushed
to and the very commit, so that the code, the weights and this file always belong together, or the folder.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

# Written by the push of a head; a folder that was only saved may be moved, and is asked for anew
REPOSITORY: str | None = None

# Options of loading that `generate` hands on together with its own
_LOADING_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")

_lock = threading.Lock()
_kept: dict[tuple, PreTrainedModel] = {}


def generate(model: PreTrainedModel, **kwargs: Any) -> ModelOutput | torch.LongTensor:
    """Decode with the head that lies beside this file. Called by `model.generate`.

    The head is loaded once and kept for the next call; only one is kept, that of the last dtype, device and revision.

    Args:
        model: The target.
        **kwargs: The arguments of `generate`, and options of `from_pretrained` such as `revision` and `token`.

    Returns:
        What `generate` returns with the head as `assistant_model`.

    Raises:
        ValueError: If there is an `assistant_model` already, or the function was not called by `generate`.
    """
    loading = {name: kwargs.pop(name) for name in _LOADING_OPTIONS if name in kwargs}
    if kwargs.pop("assistant_model", None) is not None:
        raise ValueError(
            "`custom_generate` loads a head by itself, got an `assistant_model` as well: drop one of the two."
        )
    return model.generate(**kwargs, assistant_model=_load_head(*_origin(), model, loading))


def _origin() -> tuple[str, str | None]:
    """The repository and commit that this file came from, or the folder and `None`."""
    # transformers files the code of a repository under its name and commit, with other signs for dots and hyphens
    *place, commit = Path(__file__).resolve().parent.parent.parts
    is_commit = re.fullmatch("[0-9a-f]{40}", commit) is not None
    if is_commit and REPOSITORY is not None:
        names = REPOSITORY.replace(".", "_dot_").replace("-", "_hyphen_").split("/")
        if [name.lstrip("_") for name in place[-len(names) :]] == [name.lstrip("_") for name in names]:
            return REPOSITORY, commit
    # A folder, or a repository that was copied or renamed: only `generate` knows what it was called with
    source = sys._getframe(2).f_locals.get("custom_generate")
    if not isinstance(source, str):
        raise ValueError(
            "expected to be called by `model.generate(..., custom_generate=REPO, trust_remote_code=True)`, got another "
            "caller: load the head with `AutoModel.from_pretrained` and pass it as `assistant_model`."
        )
    return source, commit if is_commit and not os.path.isdir(source) else None


def _load_head(source: str, commit: str | None, model: PreTrainedModel, loading: dict[str, Any]) -> PreTrainedModel:
    """Load the head of a repository or folder in the target's dtype, onto the device of its LM head."""
    if os.path.isdir(source) and commit is None:
        source = os.path.abspath(source)
        # A folder may be saved to again
        version = tuple(sorted((path.name, path.stat().st_mtime_ns) for path in Path(source).glob("*.safetensors")))
    else:
        if commit is not None:
            loading["revision"] = commit
        version = loading.get("revision")
    device = _device_of_lm_head(model)
    key = (source, version, model.dtype, device)
    with _lock:
        head = _kept.get(key)
        if head is None:
            # Whoever let this file run trusts its repository
            head = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=model.dtype, **loading).to(device)
            _kept.clear()
            _kept[key] = head
    return head


def _device_of_lm_head(model: PreTrainedModel) -> torch.device:
    lm_head = model.get_output_embeddings()
    if lm_head is None:
        return model.device  # the head refuses such a target, with a better message
    # Where accelerate moves the weight that it offloads
    device = getattr(getattr(lm_head, "_hf_hook", None), "execution_device", None)
    return lm_head.weight.device if device is None else torch.device(device)


def save_custom_generate(folder: str | os.PathLike) -> None:
    """Write `custom_generate/generate.py` beside a saved head.

    Args:
        folder: The folder of the head.
    """
    destination = Path(folder, "custom_generate", "generate.py")
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(__file__, destination)
