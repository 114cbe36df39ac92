"""The ways to generate that a benchmark compares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .measuring import Answer, measure
from .records import FSPAD, PLAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fspad import FSPADConfig, FSPADModel

PROMPT_LOOKUP = "prompt-lookup"
NO_LOOKUP = "fspad-no-lookup"
CHAIN = "fspad-chain"
REFERENCE = "fspad-reference"
EARLY_EXIT = "early-exit"
PROMPT_LOOKUP_TOKENS = 10
# Tokens of the tree of EAGLE-2 and of the paper, the root not counted
REFERENCE_DRAFT_TOKENS = 59

# What a saved configuration tells of files and releases, and not of what is drafted.
_NOT_OF_THE_HEAD = frozenset(("_name_or_path", "transformers_version", "dtype", "auto_map"))


@dataclass(frozen=True)
class Method:
    """A way to generate.

    Args:
        name: What it is called in records.
        head: The head that drafts, or `None`.
        options: Options of `generate`.
        settings: Values of the head's configuration for this method alone.
    """

    name: str
    head: FSPADModel | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def answer(
        self, target: PreTrainedModel, inputs: dict[str, torch.Tensor], max_new_tokens: int, temperature: float
    ) -> Answer:
        """Generate one answer and take the time.

        Args:
            target: The model that answers.
            inputs: `input_ids` and `attention_mask` of one prompt, of shape `(1, length)`.
            max_new_tokens: Length limit.
            temperature: 0 for greedy decoding.
        """
        if self.head is None:
            return measure(target, inputs, None, max_new_tokens, temperature, **self.options)
        with changed(self.head.config, self.settings):
            return measure(target, inputs, self.head, max_new_tokens, temperature)


@contextmanager
def changed(config: FSPADConfig, settings: Mapping[str, Any]) -> Iterator[None]:
    """Change fields of a configuration inside of the `with` block.

    Args:
        config: The configuration.
        settings: New values by the names of fields.
    """
    before = {name: getattr(config, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def make_methods(
    head: FSPADModel,
    target: PreTrainedModel,
    also: Mapping[str, FSPADModel] | None = None,
    early_exit: int | None = None,
) -> list[Method]:
    """The head and its peers.

    Args:
        head: The head that is measured.
        target: The model that answers.
        also: Other heads for the same target, by their names.
        early_exit: Number of the target's own layers that draft, for targets that were trained for it.

    Returns:
        Plain generation, prompt lookup, the head as it is, without lookup, as a chain, and with the tree of the reference,
        and what else is asked for.

    Raises:
        ValueError: If two methods have the same name, or so many layers are no early exit.
    """
    methods = [
        Method(PLAIN),
        Method(PROMPT_LOOKUP, options={"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS}),
        Method(FSPAD, head),
        Method(NO_LOOKUP, head, settings={"lookup": False}),
        Method(CHAIN, head, settings={"lookup": False, "draft_top_k": 1}),
        Method(REFERENCE, head, settings={"lookup": False, "num_draft_tokens": REFERENCE_DRAFT_TOKENS}),
    ]
    methods += [Method(name, other) for name, other in (also or {}).items()]
    if early_exit is not None:
        num_layers = target.config.get_text_config(decoder=True).num_hidden_layers
        if not 0 < early_exit < num_layers:
            raise ValueError(f"expected `--early-exit` between 1 and {num_layers - 1}, got {early_exit}")
        methods.append(Method(EARLY_EXIT, options={"assistant_early_exit": early_exit}))
    names = [method.name for method in methods]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"expected a name of its own for each method, got two of {min(twice)!r}: rename the `--also`."
        )
    return methods


def choose_methods(methods: list[Method], names: list[str] | None) -> list[Method]:
    """Choose methods by name. Plain generation, with which all are compared, is always among them.

    Args:
        methods: All methods.
        names: Names of some; `None` or none for all.

    Raises:
        ValueError: If there is no method of a name.
    """
    known = [method.name for method in methods]
    for name in names or ():
        if name not in known:
            raise ValueError(f"expected `--method` to be one of {', '.join(known)}, got {name!r}")
    return [method for method in methods if not names or method.name in (PLAIN, *names)]


def head_hash(head: FSPADModel) -> str:
    """The fingerprint of a head: the SHA-256 of its weights and of what its configuration says about drafting.

    Args:
        head: The head, in the dtype that it is run in.

    Returns:
        64 hexadecimal digits.
    """
    values = {name: value for name, value in head.config.to_dict().items() if name not in _NOT_OF_THE_HEAD}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for name, tensor in sorted(head.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
