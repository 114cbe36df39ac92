"""Lets stock `generate` hand its loop to an assistant that brings its own.

Three methods of transformers are wrapped, once a process however many revisions of this file are loaded. All ask the
assistant by duck typing: whoever has a method `assisted_decoding(target, input_ids, **kwargs)` is given the loop, with
the keyword arguments of `GenerationMixin._assisted_decoding`. Every other assistant gets stock behaviour untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import transformers
from transformers import GenerationConfig, GenerationMixin

from .target_config import check_decoder_only

# The attribute that marks a wrapper. Its name and value are a protocol between revisions of this file: do not change.
HOOK_MARK = "_fspad_hook"


def brings_own_loop(assistant: Any) -> bool:
    """Whether an assistant model decodes by itself."""
    return callable(getattr(assistant, "assisted_decoding", None))


def install_hook() -> None:
    """Wrap the methods of transformers, those of them that are not wrapped already.

    Raises:
        ImportError: If this release of transformers lacks one of them.
    """
    for owner, name in WRAPPERS:
        if not hasattr(owner, name):
            raise ImportError(
                f"transformers {transformers.__version__} has no {owner.__name__}.{name}, which FSPAD heads hook into. "
                "Install a release that this head was tested with, or a newer revision of the head's code."
            )
    for (owner, name), wrap in WRAPPERS.items():
        method = getattr(owner, name)
        if not hasattr(method, HOOK_MARK):
            wrapper = functools.wraps(method)(wrap(method))
            setattr(wrapper, HOOK_MARK, 1)
            setattr(owner, name, wrapper)


def _delegate_loop(stock: Callable) -> Callable:
    def assisted_decoding(self: GenerationMixin, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        assistant = kwargs.get("assistant_model")
        if brings_own_loop(assistant):
            return assistant.assisted_decoding(self, input_ids, *args, **kwargs)
        return stock(self, input_ids, *args, **kwargs)

    return assisted_decoding


def _refuse_other_searches(stock: Callable) -> Callable:
    # Here and not later: stock code asks for trust in a repository before it validates a contrastive search
    def get_generation_mode(self: GenerationConfig, assistant_model: Any = None) -> str:
        mode = stock(self, assistant_model)
        if brings_own_loop(assistant_model):
            install_hook()  # some library may have put a stock method back since
        if brings_own_loop(assistant_model) and mode != "assisted_generation":
            raise ValueError(
                "an FSPAD head assists greedy decoding and sampling, got options that ask for "
                f"{getattr(mode, 'value', mode).replace('_', ' ')}. Drop those options or `assistant_model`."
            )
        return mode

    return get_generation_mode


def _validate_own_loop(stock: Callable) -> Callable:
    def validate_generation_mode(
        self: GenerationMixin,
        generation_mode: str,
        generation_config: GenerationConfig,
        generation_mode_kwargs: dict[str, Any],
    ) -> None:
        if brings_own_loop(generation_mode_kwargs.get("assistant_model")):
            return check_target_and_drafts(self, generation_config)
        return stock(self, generation_mode, generation_config, generation_mode_kwargs)

    return validate_generation_mode


def check_target_and_drafts(target: GenerationMixin, generation_config: GenerationConfig) -> None:
    """Refuse what no head can assist, before anything has happened.

    Args:
        target: The model whose `generate` was called.
        generation_config: The options of `generate`.

    Raises:
        ValueError: For encoder-decoder targets and a second source of drafts.
    """
    check_decoder_only(target.config)
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
        if getattr(generation_config, name, None):
            raise ValueError(
                f"`{name}` and an FSPAD head are two sources of drafts, only one can be used: drop `{name}` or "
                "`assistant_model`."
            )
    if getattr(generation_config, "dola_layers", None) is not None:
        raise ValueError(
            "`dola_layers` decodes in another way, which an FSPAD head cannot assist: drop `dola_layers` or "
            "`assistant_model`."
        )
    if getattr(generation_config, "assistant_ensemble_weight", None) is not None:
        raise ValueError(
            "`assistant_ensemble_weight` mixes an assistant's probabilities into the text, and an FSPAD head never changes "
            "the text: drop `assistant_ensemble_weight` or `assistant_model`."
        )
    if getattr(generation_config, "speculation_type", None) is not None:
        raise ValueError(
            "`speculation_type` chooses among the assistants of transformers, and an FSPAD head is none of them: drop "
            "`speculation_type` or `assistant_model`."
        )


WRAPPERS = {
    (GenerationMixin, "_assisted_decoding"): _delegate_loop,
    (GenerationMixin, "_validate_generation_mode"): _validate_own_loop,
    (GenerationConfig, "get_generation_mode"): _refuse_other_searches,
}
