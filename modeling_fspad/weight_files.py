"""What files may hold a head, and what is in them, read before anything is allocated.

transformers would allocate what `config.json` says and the weights lack, however much that is. So the headers of the
weight files are read first, and compared with the configuration.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import torch
from transformers.modeling_utils import load_state_dict

from .config_checks import DTYPES, shorten, shorten_names

if TYPE_CHECKING:
    from .modeling_fspad import FSPADModel

ONLY_SAFETENSORS = (
    "Weights of FSPAD heads are read from safetensors files only; `fspad convert` turns checkpoints of other "
    "implementations into heads, without running code that a pickle may hold."
)
# A head has about twenty weights, whose names and shapes take two kilobytes
MOST_HEADER_BYTES = 2**20
MOST_JSON_BYTES = 2**20
_DTYPES = {getattr(torch, name) for name in DTYPES}
# The files of a folder that are read
_READ = re.compile(r"(adapter_)?config\.json|.*\.index\.json|.*\.safetensors|pytorch_model.*\.bin")


def check_folder(name: str | os.PathLike | None, subfolder: str = "") -> None:
    """Refuse a folder whose files are no files, are too large to be those of a head, or are not those of a head.

    For a distributed checkpoint transformers allocates before it reads.

    Args:
        name: Folder or Hub id of the head.
        subfolder: Where in it the head is.

    Raises:
        ValueError: If a file is a pipe or a device, a JSON file is far too large, or the folder holds a distributed
            checkpoint.
    """
    folder = "" if name is None else os.path.join(name, subfolder)
    if not os.path.isdir(folder):
        return
    for file in os.listdir(folder):
        path = os.path.join(folder, file)
        if _READ.fullmatch(file):
            if not os.path.isfile(path) and not os.path.isdir(path):
                raise ValueError(f"expected {_printable(path)} to be a file, got a pipe, a device or a broken link")
            if file.endswith(".json"):
                check_size(path)
        if file.startswith("shard-"):
            raise ValueError(
                f"expected a head with its weights in model.safetensors, got a distributed checkpoint ({file}, ...) in "
                f"{folder}: save the head as a whole."
            )


def check_size(path: str | os.PathLike) -> None:
    """Refuse a JSON file that is far too large to be one of a head, before it is read.

    Args:
        path: The file.

    Raises:
        ValueError: If it is.
    """
    if os.path.isfile(path) and (size := os.path.getsize(path)) > MOST_JSON_BYTES:
        raise ValueError(
            f"expected {_printable(path)} to be the small file of a head, got {size:,} bytes: download it again"
        )


def check_weight_files(files: list[str], folder: str | os.PathLike | None) -> None:
    """Check that weight files, whose names an index may have listed, are safetensors and lie where the head lies.

    Args:
        files: Paths of the weight files.
        folder: Folder or Hub id of the head.

    Raises:
        ValueError: If one of them is of another kind, or outside of the head's folder.
    """
    for file in map(os.fspath, files):
        if not file.endswith(".safetensors"):
            raise ValueError(f"expected weights in safetensors files, got {_printable(file)}. {ONLY_SAFETENSORS}")
        if folder is not None and os.path.isdir(folder):
            root = os.path.abspath(folder)
            if os.path.commonpath([root, os.path.abspath(file)]) != root:
                raise ValueError(
                    f"expected weights inside of {root}, got {_printable(file)}: the head's index points elsewhere."
                )


def read_header(file: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read names, shapes and dtypes of a safetensors file, and no values.

    Args:
        file: Its path.

    Returns:
        Tensors on the meta device, by name.

    Raises:
        ValueError: If the file is damaged, or its header is far larger than that of a head.
    """
    file = os.fspath(file)
    if not os.path.isfile(file):
        raise ValueError(f"expected {_printable(file)} to be a file, got a folder, a pipe, a device or nothing")
    try:
        # The first eight bytes are the length of the header
        length = torch.from_file(file, size=1, dtype=torch.int64).item() if os.path.getsize(file) >= 8 else -1
        if length > MOST_HEADER_BYTES:
            raise ValueError(f"a header of {length:,} bytes, where that of a head has a few thousand")
        return load_state_dict(file, map_location="meta")
    except Exception as error:  # safetensors has an error of its own, which only that package names
        raise ValueError(
            f"{_printable(file)} is damaged or incomplete ({shorten(str(error))}): download it again"
        ) from error


def read_shapes(file: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in a safetensors file, by name.

    Args:
        file: Its path.

    Raises:
        ValueError: If the file is damaged, or a weight is in a dtype that a head does not have.
    """
    header = read_header(file)
    if other := {name for name, tensor in header.items() if tensor.dtype not in _DTYPES}:
        raise ValueError(f"expected weights in {', '.join(DTYPES)}, got others in {shorten_names(other)} of {file}")
    return {name: tuple(tensor.shape) for name, tensor in header.items()}


def check_weights(model: FSPADModel, state_dict: dict[str, torch.Tensor] | None, files: list[str] | None) -> None:
    """Check that a checkpoint holds the weights that its configuration implies, by names and shapes only.

    Args:
        model: The head, not yet loaded.
        state_dict: Its weights, if they are in memory.
        files: The safetensors files that hold them otherwise.

    Raises:
        ValueError: If weights are missing, unknown, of another shape, or integers instead of floats or the reverse.
    """
    # Of the configuration and not of the model, whose layers a quantization may have replaced
    with torch.device("meta"):
        expected = type(model)(model.config).state_dict()
    if state_dict is None:
        state_dict = {}
        for file in files or ():
            state_dict.update(read_header(file))
    check_names(set(expected) - set(state_dict), set(state_dict) - set(expected))
    wrong = [
        f"{name} is {_describe(state_dict[name])} instead of {_describe(tensor)}"
        for name, tensor in expected.items()
        if _describe(state_dict[name]) != _describe(tensor)
    ]
    if wrong:
        raise ValueError(
            f"the checkpoint does not match its config.json: {'; '.join(wrong)}. Download it again; if config.json was "
            "edited, restore it."
        )


def check_names(missing: set[str], unknown: set[str]) -> None:
    """Check that a checkpoint holds all weights of a head and no others.

    Args:
        missing: Names of weights that the checkpoint lacks.
        unknown: Names of weights that the head has no place for; a draft vocabulary may be turned off while loading.

    Raises:
        ValueError: If there are any.
    """
    unknown = unknown - {"draft_vocab_ids"}
    if missing or unknown:
        raise ValueError(
            f"the checkpoint does not match its config.json: missing weights {shorten_names(missing)}, unknown weights "
            f"{shorten_names(unknown)}. Download it again, or convert checkpoints of other implementations with `fspad "
            "convert`."
        )


def _describe(tensor: torch.Tensor) -> str:
    kind = "floats" if tensor.is_floating_point() else "integers"
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in _DTYPES):
        kind = str(tensor.dtype)
    shape = tuple(tensor.shape)
    return f"{kind} of shape {shape if len(shape) < 9 else shorten(shape)}"


def _printable(path: str | os.PathLike) -> str:
    """The end of a path, which a stranger's index may have named."""
    return "".join(sign if sign.isprintable() else "?" for sign in os.fspath(path)[-300:])


def check_draft_vocabulary(token_ids: torch.Tensor, vocab_size: int) -> None:
    """Check the tokens that a head scores.

    Args:
        token_ids: Token ids of shape `(draft_vocab,)`.
        vocab_size: Vocabulary size of the target.

    Raises:
        ValueError: If there is none, or an id is negative, outside of the vocabulary, or there twice.
    """
    unique = token_ids.unique()
    if unique.numel() == 0:
        raise ValueError("a draft vocabulary holds at least one token id, got none")
    if unique.numel() != token_ids.numel() or unique[0] < 0 or unique[-1] >= vocab_size:
        raise ValueError(
            f"a draft vocabulary holds distinct token ids from 0 to {vocab_size - 1}, got "
            f"{token_ids.numel()} ids, {unique.numel()} of them distinct, from {unique[0]} to {unique[-1]}"
        )
