"""Lets stock `generate` hand its loop to an assistant that brings its own.

Two methods of `GenerationMixin` are wrapped, once a process however many revisions of this file are loaded. Both ask the
assistant by duck typing: whoever has a method `assisted_decoding(target, input_ids, **kwargs)` is given the loop, with
the keyword arguments of `GenerationMixin._assisted_decoding`. Every other assistant gets stock behaviour untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import transformers
from transformers import GenerationConfig, GenerationMixin

# The attribute that marks a wrapper. Its name and value are a protocol between revisions of this file: do not change.
HOOK_MARK = "_fspad_hook"
WRAPPED_METHODS = ("_assisted_decoding", "_validate_generation_mode")


def brings_own_loop(assistant: Any) -> bool:
    """Whether an assistant model decodes by itself."""
    return callable(getattr(assistant, "assisted_decoding", None))


def install_hook() -> None:
    """Wrap the two methods of `GenerationMixin`, unless they are wrapped already.

    Raises:
        ImportError: If this release of transformers has no such methods.
    """
    missing = [name for name in WRAPPED_METHODS if not hasattr(GenerationMixin, name)]
    if missing:
        raise ImportError(
            f"transformers {transformers.__version__} has no GenerationMixin.{' or '.join(missing)}, which FSPAD heads "
            "hook into. Install a release that this head was tested with, or a newer revision of the head's code."
        )
    for name, wrap in zip(WRAPPED_METHODS, (_delegate_loop, _validate_own_loop), strict=True):
        method = getattr(GenerationMixin, name)
        if not hasattr(method, HOOK_MARK):
            wrapper = functools.wraps(method)(wrap(method))
            setattr(wrapper, HOOK_MARK, 1)
            setattr(GenerationMixin, name, wrapper)


def _delegate_loop(stock: Callable) -> Callable:
    def assisted_decoding(self: GenerationMixin, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        assistant = kwargs.get("assistant_model")
        if brings_own_loop(assistant):
            return assistant.assisted_decoding(self, input_ids, *args, **kwargs)
        return stock(self, input_ids, *args, **kwargs)

    return assisted_decoding


def _validate_own_loop(stock: Callable) -> Callable:
    def validate_generation_mode(
        self: GenerationMixin,
        generation_mode: str,
        generation_config: GenerationConfig,
        generation_mode_kwargs: dict[str, Any],
    ) -> None:
        if brings_own_loop(generation_mode_kwargs.get("assistant_model")):
            return check_generation_mode(self, generation_mode, generation_config)
        return stock(self, generation_mode, generation_config, generation_mode_kwargs)

    return validate_generation_mode


def check_generation_mode(target: GenerationMixin, generation_mode: str, generation_config: GenerationConfig) -> None:
    """Refuse what no head can assist, before anything has happened.

    Args:
        target: The model whose `generate` was called.
        generation_mode: The mode that `generate` derived from its options.
        generation_config: Those options.

    Raises:
        ValueError: For encoder-decoder targets, beams and other searches, and a second source of drafts.
    """
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"an FSPAD head assists decoder-only models, got the encoder-decoder {type(target).__name__}; "
            "call `generate` without `assistant_model`."
        )
    if generation_mode != "assisted_generation":
        raise ValueError(
            "an FSPAD head assists greedy decoding and sampling, got options that ask for "
            f"{str(getattr(generation_mode, 'value', generation_mode)).replace('_', ' ')} "
            f"(num_beams={generation_config.num_beams}). Drop those options or `assistant_model`."
        )
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
        if getattr(generation_config, name, None):
            raise ValueError(
                f"`{name}` and an FSPAD head are two sources of drafts, only one can be used: drop `{name}` or "
                "`assistant_model`."
            )
