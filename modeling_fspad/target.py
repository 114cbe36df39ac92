"""What a head borrows from its target: features, token embeddings and LM head. Family differences end here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .packed_linear import PackedLinear, can_pack
from .target_config import check_decoder_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .configuration_fspad import FSPADConfig


@dataclass
class _Recording:
    """What forward passes hand to the LM head: all rows are kept, the last `logits_to_keep` are passed on."""

    tap: FeatureTap
    logits_to_keep: int | None
    features: list[torch.Tensor] = field(default_factory=list)


# Of the running thread, so that a tap stays blind to what other threads do with the same target
_recording: ContextVar[_Recording | None] = ContextVar("fspad_recording", default=None)


class FeatureTap:
    """Records the features of a target, i.e. exactly what enters its LM head.

    Works as a context manager. While it is open a forward pre-hook sits on the target's output embeddings; it is inert
    for every forward pass that does not run inside [`FeatureTap.record`] of the same tap in the same thread, so that
    several threads can share a target.

    Args:
        target: A causal language model with output embeddings.

    Raises:
        ValueError: If the target has no output embeddings.
    """

    def __init__(self, target: PreTrainedModel):
        self.lm_head = target.get_output_embeddings()
        if self.lm_head is None:
            raise ValueError(
                f"{type(target).__name__} has no output embeddings (LM head) to take features from; "
                "load the target with `AutoModelForCausalLM`."
            )

    def __enter__(self) -> FeatureTap:
        self._handle = self.lm_head.register_forward_pre_hook(self._on_forward, with_kwargs=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._handle.remove()

    @contextmanager
    def record(self, logits_to_keep: int | None = None) -> Iterator[list[torch.Tensor]]:
        """Record the forward passes of the `with` block.

        Ask the target for all rows (`logits_to_keep=0`): the tap keeps them and hands on those that are needed.

        Args:
            logits_to_keep: How many of the last positions get logits; `None` for all.

        Yields:
            A list that grows by one tensor of shape `(batch, length, hidden)` a forward pass.
        """
        recording = _Recording(self, logits_to_keep)
        token = _recording.set(recording)
        try:
            yield recording.features
        finally:
            _recording.reset(token)

    def _on_forward(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple, dict] | None:
        # Without keyword arguments comes only the forward pass of another thread, while this hook comes or goes
        recording = _recording.get()
        if recording is None or recording.tap is not self:
            return None
        hidden_states, *rest = args or (next(iter(kwargs.values())),)
        recording.features.append(hidden_states)
        if recording.logits_to_keep is None:
            return None
        # Cloned: of a view with the batch stride of the whole, a CPU would multiply the LM head in a slow way
        kept = hidden_states[:, -recording.logits_to_keep :].clone(memory_format=torch.contiguous_format)
        if args:
            return (kept, *rest), kwargs
        return args, {**kwargs, next(iter(kwargs)): kept}


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: not where its weight lies, if accelerate offloads it.

    Args:
        module: A module with a `weight`.
    """
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    # Layers that torch has quantized pack their weight, and compute on the processor
    return module.weight.device if isinstance(module.weight, torch.Tensor) else torch.device("cpu")


class LMHead:
    """The target's map from features to logits, for scoring drafts and for the training loss.

    Scales and soft caps that a family applies after its LM head (Cohere, Gemma 2, Granite, ...) are applied here too.

    Args:
        target: The model whose LM head is borrowed. It is not copied unless the vocabulary is trimmed.
        token_ids: Token ids to score, of shape `(draft_vocab,)`; `None` for the whole vocabulary.
    """

    def __init__(self, target: PreTrainedModel, token_ids: torch.Tensor | None = None):
        self.module = target.get_output_embeddings()
        self.device = device_of(self.module)
        self.token_ids = None
        self.weight = self.bias = self.packed = None
        text_config = target.config.get_text_config(decoder=True)
        self.multiplier = _logit_multiplier(text_config)
        self.softcap = getattr(text_config, "final_logit_softcapping", None)
        if token_ids is not None:
            self.token_ids = token_ids.to(self.device)
            is_plain = type(self.module) is nn.Linear and self.module.weight.is_floating_point()
            if is_plain and not self.module.weight.is_meta:
                self.weight = self.module.weight.detach()[self.token_ids]
                self.bias = None if self.module.bias is None else self.module.bias.detach()[self.token_ids]

    def pack(self) -> None:
        """Lay out the rows of a trimmed vocabulary as a processor multiplies them, to draft with: gradients end there."""
        if self.weight is not None and can_pack(self.weight):
            self.packed, self.weight = PackedLinear(self.weight, self.bias), None

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of features.

        Args:
            features: Of shape `(..., hidden)`; moved to the LM head's device and dtype.

        Returns:
            Logits of shape `(..., vocab)`, or `(..., draft_vocab)` when trimmed, in the LM head's dtype.
        """
        weight = self.module.weight
        has_floats = isinstance(weight, torch.Tensor) and weight.is_floating_point()
        dtype = weight.dtype if has_floats else features.dtype
        # As one matrix: of three-dimensional views, a CPU would copy the weight for every product
        rows = features.to(device=self.device, dtype=dtype).reshape(-1, features.shape[-1])
        if self.packed is not None:
            logits = self.packed(rows)
        elif self.weight is not None:
            logits = nn.functional.linear(rows, self.weight, self.bias)
        else:
            logits = self.module(rows)
            if self.token_ids is not None:
                logits = logits[:, self.token_ids]
        logits = logits.unflatten(0, features.shape[:-1])
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def _logit_multiplier(text_config: Any) -> float:
    if (scale := getattr(text_config, "logit_scale", None)) is not None:
        return float(scale)
    if (scaling := getattr(text_config, "logits_scaling", None)) is not None:
        return 1.0 / float(scaling)
    return 1.0


def embed_tokens(target: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    """The target's token embeddings.

    Args:
        target: The model whose input embeddings are borrowed.
        token_ids: Token ids of shape `(batch, length)`.

    Returns:
        Embeddings of shape `(batch, length, hidden)` in the target's dtype.
    """
    embeddings = target.get_input_embeddings()
    return embeddings(token_ids.to(device_of(embeddings)))


def check_target(config: FSPADConfig, target: PreTrainedModel) -> None:
    """Check that a head fits a target.

    Args:
        config: The head's configuration.
        target: The model that is to be assisted.

    Raises:
        ValueError: If the target is an encoder-decoder model, or hidden size or vocabulary differ.
    """
    check_decoder_only(target.config)
    text_config = target.config.get_text_config(decoder=True)
    trained_for = f" It was trained for {config.target_model_name!r}." if config.target_model_name else ""
    for name in ("hidden_size", "vocab_size"):
        expected, got = getattr(config, name), getattr(text_config, name)
        if expected != got:
            raise ValueError(
                f"this FSPAD head does not fit the target: the head has {name}={expected}, {type(target).__name__} has "
                f"{name}={got}.{trained_for} Load the head that belongs to this target."
            )
    sizes = {
        "token embeddings": getattr(target.get_input_embeddings(), "embedding_dim", config.hidden_size),
        "LM head inputs": getattr(target.get_output_embeddings(), "in_features", config.hidden_size),
    }
    for name, size in sizes.items():
        if size != config.hidden_size:
            raise ValueError(
                f"an FSPAD head needs {name} of the hidden size {config.hidden_size}, those of {type(target).__name__} "
                f"have size {size}: this target cannot be assisted."
            )
