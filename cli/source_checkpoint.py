"""Reads draft heads of other implementations, which may come from anybody: what of `config.json` is used, and the weights."""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from fspad.config_checks import (
    DTYPES,
    MOST,
    check_integer,
    check_number,
    check_rope_parameters,
    shorten,
    shorten_names,
)
from fspad.weight_files import check_folder, check_size, read_header

MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "mixtral")
# The first that there is
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MOST_SHARDS = 64
# Copies of what is the target's, and what RoPE computes from the configuration
DROPPED = re.compile(r"(embed_tokens|lm_head)\.weight|(layers\.0\.self_attn\.)?rotary_emb\.inv_freq")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
_SAME_TYPES = {getattr(torch, name) for name in DTYPES} | {torch.int64, torch.int32, torch.bool}
# What a pickle of dense tensors is made of. torch allows more, some of which can fill any memory
_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage|torch\.storage \w+Storage"
)
MOST_PICKLE_BYTES = 2**24


def find_file(source: str, name: str, revision: str | None = None) -> Path | None:
    """Find a file of a checkpoint, and download it if need be.

    Args:
        source: Folder or Hub id.
        name: Name of the file.
        revision: Revision on the Hub.

    Returns:
        Its path, or `None` if the checkpoint has no such file.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If it is a pipe, a device, or a JSON file that is far too large.
    """
    check_folder(source)
    path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON file with a dictionary in it.

    Args:
        path: Its path.

    Raises:
        ValueError: If it is anything else.
    """
    check_size(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {path}, which cannot be read ({shorten(str(error))})") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a dictionary in {path}, got {shorten(content)}")
    return content


def read_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """Read the `config.json` of a checkpoint.

    Args:
        source: Folder or Hub id.
        revision: Revision on the Hub.

    Raises:
        OSError: If it has none, or there is no such checkpoint.
        ValueError: If it cannot be read.
    """
    check_folder(source)
    if not Path(source).is_dir():
        return read_json(Path(cached_file(source, "config.json", revision=revision)))
    path = find_file(source, "config.json")
    if path is None:
        raise FileNotFoundError(f"{source} holds no config.json: name an FSPAD or EAGLE-1/2 checkpoint")
    return read_json(path)


def layer_fields(config: dict[str, Any]) -> dict[str, Any]:
    """What the `config.json` of an original checkpoint says about the one layer of the head.

    Published heads are run by code of their own, whatever their `model_type`: what is missing has the values of Llama.

    Args:
        config: Contents of the file.

    Returns:
        Fields of [`~fspad.FSPADConfig`], and the `vocab_size`. `rope_parameters` have the form of transformers.

    Raises:
        ValueError: If it is of another model type, or a field is of another type or out of its range.
    """
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"expected a config.json with a model_type of {', '.join(MODEL_TYPES)}, as FSPAD and EAGLE-1/2 checkpoints "
            f"have, got {shorten(config.get('model_type'))}"
        )
    for name in _REQUIRED:
        check_integer(name, config.get(name), at_least=1, at_most=MOST[name])
    fields = {name: config[name] for name in _REQUIRED}
    fields["max_position_embeddings"] = config.get("max_position_embeddings", 2048)
    check_integer("max_position_embeddings", fields["max_position_embeddings"], 1, MOST["max_position_embeddings"])
    fields["rms_norm_eps"] = config.get("rms_norm_eps", 1e-6)
    check_number("rms_norm_eps", fields["rms_norm_eps"], at_least=0, at_most=1)
    fields["hidden_act"] = config.get("hidden_act", "silu")
    fields["rope_parameters"] = _rope(config, fields["max_position_embeddings"])
    return fields


def _rope(config: dict[str, Any], length: int) -> dict[str, Any]:
    """RoPE parameters in the form of transformers; in older files the type is called `type`, and the base stands outside."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling must be a dictionary, got {shorten(rope)}")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    check_integer("head_dim", head_dim, at_least=2, at_most=MOST["head_dim"])
    rope = {"rope_theta": config.get("rope_theta") or 10000.0, "rope_type": rope.get("type", "default"), **rope}
    rope.pop("type", None)
    check_rope_parameters(rope, head_dim)
    if rope["rope_type"] in ("llama3", "longrope", "yarn"):
        # Otherwise the target's length would take its place
        rope.setdefault("original_max_position_embeddings", length)
    return rope


def load_weights(source: str, revision: str | None = None) -> dict[str, torch.Tensor]:
    """Load the weights of a checkpoint without running any code it may hold.

    Args:
        source: Folder or Hub id. Safetensors go before pickles, and whole files before shards.
        revision: Revision on the Hub.

    Returns:
        Tensors by name, on the CPU, without those that are the target's.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If a file is damaged, holds more than tensors, or wants to run code.
    """
    for name in WEIGHT_FILES:
        path = find_file(source, name, revision)
        if path is None:
            continue
        files = _shards(source, path, revision) if name.endswith(".json") else [path]
        weights: dict[str, torch.Tensor] = {}
        for file in files:
            weights |= _load_file(file)
        return weights
    raise FileNotFoundError(f"{source} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")


def _shards(source: str, index: Path, revision: str | None) -> list[Path]:
    """Find the files that an index lists, which must lie beside it."""
    content = read_json(index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"expected files by names of weights in the weight_map of {index}, got {shorten(names)}")
    files = set(names.values())
    if len(files) > MOST_SHARDS:
        raise ValueError(f"expected at most {MOST_SHARDS} shards in {index}, got {len(files)}")
    suffix = ".safetensors" if index.name.startswith("model") else ".bin"
    for file in files:
        if Path(file).name != file or not file.endswith(suffix):
            raise ValueError(f"expected names of {suffix} files beside {index}, got {shorten(file)}")
    paths = {file: find_file(source, file, revision) for file in sorted(files)}
    if missing := {file for file, path in paths.items() if path is None}:
        raise FileNotFoundError(f"{index} lists {shorten_names(missing)}, not in {source}: download it again")
    return list(paths.values())


def _load_file(path: Path) -> dict[str, torch.Tensor]:
    """Load one file, and check that it holds plain tensors."""
    if path.suffix == ".safetensors":
        read_header(path)
    else:
        _check_pickle(path)
    try:
        weights = load_state_dict(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickles fail in every way
        wants = "is damaged" if path.suffix == ".safetensors" else "is damaged or wants to run code while it is loaded"
        raise ValueError(
            f"{path} {wants}; nothing of it was run ({shorten(str(error))}). Expected a file that holds tensors only: "
            "download it again, or save the state dict as model.safetensors where you trust the file."
        ) from error
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in weights.items()
    ):
        raise ValueError(f"{path} holds no state dict: expected a dictionary of tensors by name")
    weights = {name: tensor for name, tensor in weights.items() if not DROPPED.fullmatch(name.removeprefix("model."))}
    if odd := {name for name, tensor in weights.items() if not _is_plain(tensor)}:
        raise ValueError(
            f"expected dense tensors in {', '.join(DTYPES)}, got others in {shorten_names(odd)} of {path}"
        )
    return weights


def _check_pickle(path: Path) -> None:
    """Look through a pickle, without loading it, for anything that dense tensors are not made of."""
    names: set[str] = set()
    damage = None
    try:
        _collect_globals(path, names)
    except Exception as error:  # as above
        damage = error
    if odd := {name for name in names if not _GLOBALS.fullmatch(name)}:
        raise ValueError(
            f"{path} wants to run code while it is loaded, or holds other things than dense tensors: {shorten_names(odd)}. "
            "Nothing of it was run. Save the state dict as model.safetensors where you trust the file."
        )
    if damage is not None:
        raise ValueError(f"{path} is damaged ({shorten(str(damage))}): download it again") from damage


def _collect_globals(path: Path, names: set[str]) -> None:
    """Add the functions and classes that a file of `torch.save` names."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            # The older layout: a magic number, the protocol, the system, the weights, and the keys of the storages
            for _ in range(5):
                _collect_in(file, names)
        return
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed entries, which torch does not write")
        for entry in archive.infolist():
            if entry.filename.lower().endswith(".pkl"):
                if entry.file_size > MOST_PICKLE_BYTES:
                    raise ValueError(f"{entry.file_size:,} bytes of names")
                with archive.open(entry) as file:
                    _collect_in(file, names)


def _collect_in(file: IO[bytes], names: set[str]) -> None:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            names.add(str(argument))
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            names.add(opcode.name)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is dense, in memory, as large as it says, and of a dtype that weights have."""
    is_dense = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_meta or tensor.is_quantized)
    if not is_dense or tensor.dtype not in _SAME_TYPES:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
