"""Loading, saving and pushing heads, and what a checkpoint must hold before anything is allocated for it.

transformers would allocate what `config.json` says and the weights lack, however much that is. So the headers of the
weight files are read first, and compared with the configuration.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict

from .custom_generation import save_custom_generate

if TYPE_CHECKING:
    from .modeling_fspad import FSPADModel

ONLY_SAFETENSORS = (
    "Weights of FSPAD heads are read from safetensors files only; `fspad convert` turns checkpoints of other "
    "implementations into heads, without running code that a pickle may hold."
)
# What `save_pretrained` takes for `push_to_hub` and has no use for itself
HUB_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")


class CheckpointMixin:
    """How heads are loaded, saved and pushed, mixed into the model."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> FSPADModel:
        """Load a head, all of it: a head with random parts would still be lossless, and never show what is wrong.

        A head may come from anybody: weights are read from safetensors files only, which hold no code, and nothing is
        allocated for sizes in `config.json` that the weights do not have.

        Args:
            *args: As in [`~transformers.PreTrainedModel.from_pretrained`].
            output_loading_info: Whether to return the loading report as well.
            **kwargs: As in [`~transformers.PreTrainedModel.from_pretrained`]; `use_safetensors` is always on.

        Returns:
            The head, or the head and the report.

        Raises:
            OSError: If there are no safetensors files.
            ValueError: If a value in `config.json` is out of its range, or the checkpoint lacks weights, has them in
                other shapes, or holds some that the head has no place for.
        """
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        check_folder(name, kwargs.get("subfolder", ""))
        kwargs["use_safetensors"] = True
        try:
            head, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except OSError as error:
            if "model.safetensors" in str(error):
                raise OSError(f"{error} {ONLY_SAFETENSORS}") from error
            raise
        check_names(set(report["missing_keys"]), set(report["unexpected_keys"]))
        if (token_ids := getattr(head, "draft_vocab_ids", None)) is not None and not token_ids.is_meta:
            check_draft_vocabulary(token_ids, head.config.vocab_size)
        return (head, report) if output_loading_info else head

    @staticmethod
    def _load_pretrained_model(
        model: FSPADModel,
        state_dict: dict[str, torch.Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Where transformers has found the files, and the head is still on the meta device. Adapters come by here too.
        is_adapter = model._hf_peft_config_loaded
        check_weight_files(checkpoint_files or [], None if is_adapter else load_config.pretrained_model_name_or_path)
        if not is_adapter:
            check_weights(model, state_dict, checkpoint_files)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save config, weights (safetensors) and the code files that `trust_remote_code=True` loads.

        Args:
            save_directory: Folder to write to.
            push_to_hub: Whether to call [`~FSPADModel.push_to_hub`] afterwards. Its arguments go into `kwargs`, and its
                `repo_id` is by default the name of the folder.
            **kwargs: As in [`~transformers.PreTrainedModel.save_pretrained`].
        """
        hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        state_dict = dict(kwargs.pop("state_dict", None) or self.state_dict())
        # As many draft tokens as the config says, which may have been lowered since the head was made
        state_dict.pop("draft_vocab_ids", None)
        if (vocab_ids := self.active_draft_vocab_ids) is not None:
            state_dict["draft_vocab_ids"] = vocab_ids.clone()
        # FSDP makes the head one of a class in torch, whose file would be saved as the code that loads it
        own_class = type(self)
        self.__class__ = next(base for base in own_class.__mro__ if not base.__module__.startswith("torch."))
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            self.__class__ = own_class
        if not kwargs.get("is_main_process", True):
            return
        save_custom_generate(save_directory)
        if push_to_hub:
            repo_id = hub_options.pop("repo_id", None) or Path(save_directory).resolve().name
            hub_options |= {name: kwargs[name] for name in ("max_shard_size", "token") if name in kwargs}
            self.push_to_hub(repo_id, **hub_options)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload config, weights, code files and `custom_generate/generate.py`.

        The installed package adds a model card, see [`~fspad.hub_cards.push_head`]. A head whose code came with it has
        no package to ask, and is pushed as any model of transformers is.

        Args:
            repo_id: Repository on the Hub, which is created if need be.
            **kwargs: As in [`~transformers.PreTrainedModel.push_to_hub`], e.g. `private`, `revision`, `create_pr`.

        Returns:
            The commit, as a URL with the fields of [`~huggingface_hub.CommitInfo`].
        """
        if importlib.util.find_spec(".hub_cards", __package__) is None:
            return super().push_to_hub(repo_id, **kwargs)
        return importlib.import_module(".hub_cards", __package__).push_head(self, repo_id, **kwargs)


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
