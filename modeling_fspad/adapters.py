"""Adapters of heads (PEFT): loaded only when the user names them, and checked before anything is allocated for them.

transformers looks for an `adapter_config.json` beside every model once PEFT is installed, and follows the name of another
model in it. A head is loaded from where its user said. An adapter may come from anybody, as a head may.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import cached_file, find_adapter_config_file, is_peft_available, logging

from .config_checks import check_flag, check_integer, check_number, check_text, shorten, shorten_names
from .weight_files import check_folder, check_size, read_shapes

if TYPE_CHECKING:
    from .modeling_fspad import FSPADModel

logger = logging.get_logger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILE = "adapter_model.safetensors"
MOST_RANK = 1024
MOST_MODULES = 64
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Fields of `adapter_config.json` that say nothing about what is computed, or nothing without another one that is refused
_IDLE = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
)
_IDLE += ("revision", "task_type")
_CHECKED = (
    "peft_type",
    "r",
    "target_modules",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "init_lora_weights",
    "use_rslora",
)
_CHECKED += ("fan_in_fan_out",)
# The only fields in which an empty dictionary means nothing; in others it is a method with its defaults
_MAY_BE_EMPTY = ("alpha_pattern", "loftq_config", "rank_pattern")
MOST_NAME = 200
_WEIGHT = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<side>[AB])\.weight", re.ASCII)


def check_no_unnamed_adapter(name: str | os.PathLike | None, options: dict[str, Any]) -> None:
    """Refuse a head with an adapter beside it, which nobody has asked for.

    A folder or repository that holds an adapter and no head was named for the adapter, whose head is loaded then.

    Args:
        name: Folder or Hub id that is about to be loaded.
        options: Arguments of `from_pretrained`. `AutoModel` has followed an adapter by now and says in them where from.

    Raises:
        ValueError: If there is a head with an adapter beside it, or an adapter from the Hub names a folder of this machine.
    """
    if name is None or not is_peft_available():
        return
    name = os.fspath(name)
    hub_options = {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}
    followed = (options.get("adapter_kwargs") or {}).get("_adapter_model_path")
    if followed is not None:
        # The other revision is that of the head that was followed
        hub_options["revision"] = options["adapter_kwargs"].get("revision")
    source = os.fspath(followed or name)
    if followed is None and find_adapter_config_file(source, **hub_options) is None:
        return
    if _holds_head(source, hub_options):
        raise ValueError(
            f"expected a head by itself, got {CONFIG_FILE} beside it in {source}: an adapter is loaded when you name it. Take "
            "the file away, and load an adapter with `head.load_adapter(FOLDER)` or `PeftModel.from_pretrained(head, FOLDER)`."
        )
    base = name if followed is not None else read_adapter_config(source, hub_options).get("base_model_name_or_path")
    if not base or not isinstance(base, str) or (os.path.isdir(base) and not os.path.isdir(source)):
        raise ValueError(
            f"expected the adapter {source} to name the Hub id of its head, got {shorten(base)}: load the head first, and "
            "then the adapter with `head.load_adapter`."
        )
    check_folder(base)
    logger.warning_once(f"{source} holds an adapter; the head that it names is loaded: {shorten(base)}.")


def check_adapter(head: FSPADModel, source: str | os.PathLike, options: dict[str, Any]) -> None:
    """Check that an adapter is a LoRA of a head's linear layers, by its configuration and the names and shapes of its weights.

    Args:
        head: The head that it is for.
        source: Folder or Hub id of the adapter.
        options: Where on the Hub it is, as in `from_pretrained`.

    Raises:
        OSError: If there is no such adapter, or its weights are not in a safetensors file.
        ValueError: If it is anything else, or does not fit the head.
    """
    source = os.fspath(source)
    options = {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}
    if "revision" in options:  # maybe looked up already, and for another repository
        options["revision"] = getattr(options["revision"], "initial", options["revision"])
    rank = check_adapter_config(read_adapter_config(source, options))
    layers = {
        path.removesuffix(".base_layer"): module  # of a head that has an adapter already
        for path, module in head.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in path
    }
    for name, shape in read_shapes(cached_file(source, WEIGHT_FILE, **options)).items():
        match = _WEIGHT.fullmatch(name)
        layer = layers.get(match["module"]) if match else None
        if layer is None:
            raise ValueError(f"expected LoRA weights of the head's linear layers, got {shorten(name)} in {source}")
        expected = (rank, layer.in_features) if match["side"] == "A" else (layer.out_features, rank)
        if shape != expected:
            raise ValueError(f"expected {name} to have the shape {expected}, got {shape} in {source}")


def check_adapter_config(fields: dict[str, Any]) -> int:
    """Check what an adapter's configuration says.

    Args:
        fields: Contents of `adapter_config.json`.

    Returns:
        The rank.

    Raises:
        ValueError: If it is no plain LoRA: a value is out of its range, modules are named by a pattern, which could take
            for ever to match, or more is asked for than a head's file may ask for.
    """
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"expected an adapter with peft_type LORA, got {shorten(fields.get('peft_type'))}")
    check_integer("r", fields.get("r"), at_least=1, at_most=MOST_RANK)
    check_number("lora_alpha", fields.get("lora_alpha", 8), at_least=0, at_most=1e6)
    check_number("lora_dropout", fields.get("lora_dropout", 0), at_least=0, at_most=1)
    for name in ("init_lora_weights", "use_rslora", "fan_in_fan_out"):
        if (name, fields.get(name)) != ("init_lora_weights", "gaussian"):
            check_flag(name, fields.get(name, False))
    if fields.get("bias", "none") != "none":
        raise ValueError(f"expected an adapter with bias 'none', got {shorten(fields['bias'])}")
    modules = fields.get("target_modules")
    is_list = isinstance(modules, list) and 0 < len(modules) <= MOST_MODULES
    is_list = is_list and all(isinstance(name, str) and len(name) <= MOST_NAME for name in modules)
    if modules != "all-linear" and not is_list:
        raise ValueError(
            f"target_modules must be 'all-linear' or a list of at most {MOST_MODULES} names, got {shorten(modules)}"
        )
    check_text("task_type", fields.get("task_type"))
    asked_for = {
        name for name, value in fields.items() if name not in {*_IDLE, *_CHECKED} and not _is_off(name, value)
    }
    if asked_for:
        raise ValueError(
            f"expected a plain LoRA, got {CONFIG_FILE} with {shorten_names(asked_for)}: if you trust it, wrap the head with "
            "`PeftModel.from_pretrained(head, FOLDER)`."
        )
    return fields["r"]


def read_adapter_config(source: str, options: dict[str, Any]) -> dict[str, Any]:
    """Read `adapter_config.json`.

    Args:
        source: Folder or Hub id of the adapter.
        options: Where on the Hub it is, as in `from_pretrained`.

    Returns:
        Its contents.

    Raises:
        OSError: If there is none.
        ValueError: If it holds no dictionary.
    """
    if (path := cached_file(source, CONFIG_FILE, **options)) is not None:
        check_size(path)
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source, _configuration_file=CONFIG_FILE, **options)
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(
            f"{CONFIG_FILE} of {source} is damaged: expected a dictionary ({shorten(str(error))})"
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"{CONFIG_FILE} of {source} is damaged: expected a dictionary, got {shorten(fields)}")
    fields.pop("_commit_hash", None)  # added by some releases of transformers
    return fields


def _is_off(name: str, value: Any) -> bool:
    return value is None or value is False or (value == {} and name in _MAY_BE_EMPTY)


def _holds_head(source: str, options: dict[str, Any]) -> bool:
    quietly = dict.fromkeys(
        (
            "_raise_exceptions_for_gated_repo",
            "_raise_exceptions_for_missing_entries",
            "_raise_exceptions_for_connection_errors",
        ),
        False,
    )
    return cached_file(source, "config.json", **options, **quietly) is not None
