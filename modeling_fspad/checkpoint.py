"""What a checkpoint must hold before anything is allocated for it.

transformers would allocate what `config.json` says and the weights lack, however much that is. So the headers of the
weight files are read first, and compared with the configuration.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from transformers.modeling_utils import load_state_dict

if TYPE_CHECKING:
    from .modeling_fspad import FSPADModel

ONLY_SAFETENSORS = (
    "Weights of FSPAD heads are read from safetensors files only; `fspad convert` turns checkpoints of other "
    "implementations into heads, without running code that a pickle may hold."
)


def check_folder(name: str | os.PathLike | None, subfolder: str) -> None:
    """Refuse a folder with weights in a layout for which transformers allocates before it reads.

    Args:
        name: Folder or Hub id of the head.
        subfolder: Where in it the head is.

    Raises:
        ValueError: If the folder holds a distributed checkpoint.
    """
    folder = "" if name is None else os.path.join(name, subfolder)
    shards = [file for file in os.listdir(folder) if file.startswith("shard-")] if os.path.isdir(folder) else []
    if shards:
        raise ValueError(
            f"expected a head with its weights in model.safetensors, got a distributed checkpoint ({shards[0]}, ...) in "
            f"{folder}: save the head as a whole."
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
            raise ValueError(f"expected weights in safetensors files, got {file}. {ONLY_SAFETENSORS}")
        if folder is not None and os.path.isdir(folder):
            root = os.path.abspath(folder)
            if os.path.commonpath([root, os.path.abspath(file)]) != root:
                raise ValueError(f"expected weights inside of {root}, got {file}: the head's index points elsewhere.")


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
            state_dict.update(load_state_dict(file, map_location="meta"))
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
            f"the checkpoint does not match its config.json: missing weights {sorted(missing)}, unknown weights "
            f"{sorted(unknown)}. Download it again, or convert checkpoints of other implementations with `fspad convert`."
        )


def _describe(tensor: torch.Tensor) -> str:
    return f"{'floats' if tensor.is_floating_point() else 'integers'} of shape {tuple(tensor.shape)}"


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
