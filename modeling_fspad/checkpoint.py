"""How heads are loaded, saved and pushed. A head may come from anybody."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from .adapters import check_adapter, check_no_unnamed_adapter
from .config_checks import shorten
from .custom_generation import save_custom_generate
from .weight_files import (
    ONLY_SAFETENSORS,
    check_draft_vocabulary,
    check_folder,
    check_names,
    check_weight_files,
    check_weights,
)

if TYPE_CHECKING:
    from .modeling_fspad import FSPADModel

# What a damaged file makes transformers and PEFT raise, beside errors that say what is wrong with it
DAMAGE = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ZeroDivisionError)
DAMAGE += (json.JSONDecodeError, UnicodeDecodeError)
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
            ValueError: If a file is damaged, a value in `config.json` is out of its range, the checkpoint lacks weights, has
                them in other shapes, or holds some that the head has no place for, or an adapter lies beside it that
                nobody has named.
        """
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        check_folder(name, kwargs.get("subfolder", ""))
        check_no_unnamed_adapter(name, kwargs)
        kwargs["use_safetensors"] = True
        try:
            head, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except DAMAGE as error:
            raise _damaged("head", name, error) from error
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

    def load_adapter(self, peft_model_id: str | os.PathLike | None = None, *args: Any, **kwargs: Any) -> Any:
        """Load a LoRA of the head's linear layers.

        Args:
            peft_model_id: Folder or Hub id of the adapter. Its files may come from anybody, so no patterns in them are
                evaluated, and rank, names and shapes are checked before anything is allocated.
            *args: As in `load_adapter` of transformers.
            **kwargs: As in `load_adapter` of transformers.

        Returns:
            The loading report.

        Raises:
            OSError: If there is no such adapter, or its weights are not in a safetensors file.
            ValueError: If it is no plain LoRA, or does not fit the head.
        """
        load_config = kwargs.get("load_config")
        source = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
        if source is not None and kwargs.get("peft_config") is None:
            check_folder(source)
            loading = kwargs.get("download_kwargs") or getattr(load_config, "download_kwargs", None) or {}
            check_adapter(self, source, {**loading, **(kwargs.get("adapter_kwargs") or {}), **kwargs})
        try:
            return super().load_adapter(peft_model_id, *args, **kwargs)
        except DAMAGE as error:
            raise _damaged("adapter", source, error) from error

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


def _damaged(what: str, name: str | os.PathLike | None, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {shorten(str(error))}"
    return ValueError(
        f"no {what} can be loaded from {name}: a file is damaged, or an argument is wrong ({reason}). "
        "Download it again, or leave the argument out."
    )
