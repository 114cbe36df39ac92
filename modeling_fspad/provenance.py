"""Which target a head belongs to: its id and revision on the Hub, its vocabulary, and a sample of its weights."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import cached_file, extract_commit_hash, logging

from .config_checks import NUM_WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .configuration_fspad import FSPADConfig

logger = logging.get_logger(__name__)

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# From which relative distance on two samples of LM heads are of two targets: another
# dtype, quantization or fine-tuning moves them by less than a tenth, and two targets that were trained apart by about 1.4
_ANOTHER_TARGET = 0.5


def as_hub_id(name: Any) -> str | None:
    """A model's name if it is one of the Hub, and not a folder or file of this machine, which means nothing elsewhere.

    Args:
        name: What a model was loaded from.

    Returns:
        The name, or `None`.
    """
    is_id = isinstance(name, str) and len(name) <= 96 and _HUB_ID.fullmatch(name) and ".." not in name
    return name if is_id and not os.path.exists(name) else None


def target_id(target_config: PreTrainedConfig) -> str | None:
    """The Hub id that a target was loaded from; `None` for folders, and for models made in memory.

    Args:
        target_config: The target's configuration.
    """
    return as_hub_id(getattr(target_config, "_name_or_path", None))


def target_revision(target_config: PreTrainedConfig) -> str | None:
    """The commit that a target was loaded from, where its configuration tells.

    Releases of transformers differ in that: some keep it, newer ones do not. See [`note_default_revision`].

    Args:
        target_config: The target's configuration.
    """
    revision = getattr(target_config, "_commit_hash", None)
    return revision if target_id(target_config) is not None else None


def note_default_revision(target_config: PreTrainedConfig) -> None:
    """Write down which commit a target came from that has just been loaded from the default branch of its repository.

    Asks the local cache only, never the network.

    Args:
        target_config: The target's configuration, changed in place if it does not tell already.
    """
    name = target_id(target_config)
    if name is None or getattr(target_config, "_commit_hash", None) is not None:
        return
    try:
        path = cached_file(name, "config.json", local_files_only=True)
    except OSError:  # a model under a name that it was not loaded from
        return
    target_config._commit_hash = extract_commit_hash(path, None)


def warn_of_another_target(config: FSPADConfig, target: PreTrainedModel) -> None:
    """Say once that a head assists another target, or another revision of it, than it was trained for.

    The text stays the target's own, only drafts suffer. Folders, GGUF files and models without a name may well be the
    recorded target, and are passed over.

    Args:
        config: The head's configuration.
        target: The model that is to be assisted.
    """
    warn_of_other_weights(config, target)
    recorded, name = config.target_model_name, target_id(target.config)
    is_comparable = recorded and name and "/" in recorded and "/" in name and "gguf" not in name.lower()
    if not is_comparable or as_hub_id(recorded) is None:
        return
    consequence = "the text is the target's own all the same, but fewer drafts may be accepted."
    if recorded != name:
        logger.warning_once(f"This FSPAD head was trained for {recorded!r}, the target is {name!r}: {consequence}")
        return
    revisions = config.target_revision, target_revision(target.config)
    # A branch or tag cannot be compared with a commit
    if all(revision and _COMMIT.fullmatch(revision) for revision in revisions) and revisions[0] != revisions[1]:
        logger.warning_once(
            f"This FSPAD head was trained for revision {revisions[0]} of {name!r}, the target is of revision "
            f"{revisions[1]}: {consequence}"
        )


def sample_weights(target: PreTrainedModel) -> list[float] | None:
    """Take some values of a target's LM head, spread over its rows.

    Args:
        target: The target.

    Returns:
        32 values; `None` where the LM head's weights are not at hand as finite floating-point numbers.
    """
    weight = getattr(target.get_output_embeddings(), "weight", None)
    # Of a subclass, as that of weights spread over devices, single values may not be had
    is_at_hand = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_floating_point()
    if not is_at_hand or weight.is_meta or weight.dim() != 2:
        return None
    places = torch.arange(NUM_WEIGHTS, device=weight.device)
    columns = places * 7919 % weight.shape[1]  # a prime, so that they are all over
    values = weight.detach()[places * weight.shape[0] // NUM_WEIGHTS, columns].float().tolist()
    return [float(f"{value:.4g}") for value in values] if all(map(math.isfinite, values)) else None


def warn_of_other_weights(config: FSPADConfig, target: PreTrainedModel) -> None:
    """Say once that a head was trained for a target with other weights, however it is called.

    Args:
        config: The head's configuration.
        target: The model that is to be assisted or trained for.
    """
    # The head may have come with older code of its own
    recorded = getattr(config, "target_weights", None)
    now = recorded and sample_weights(target)
    if not now:
        return
    before, after = torch.tensor(recorded), torch.tensor(now)
    distance = (before - after).norm() / torch.maximum(before.norm(), after.norm()).clamp(min=1e-12)
    if not distance <= _ANOTHER_TARGET:
        owner = f" ({config.target_model_name!r})" if config.target_model_name else ""
        logger.warning_once(
            f"This FSPAD head was trained for a target{owner} with other weights than this {type(target).__name__} has: the "
            "text is the target's own all the same, but hardly any draft will be accepted."
        )


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """The fingerprint of a vocabulary: the SHA-256 of its tokens and their ids, sorted by token.

    Args:
        tokenizer: A tokenizer, or a processor that holds one.

    Returns:
        64 hexadecimal digits.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    pairs = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode("ascii")).hexdigest()


def check_vocabulary(config: FSPADConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer has the vocabulary that a head was trained for. Heads of the same size may differ in it.

    Args:
        config: The head's configuration; one without a recorded hash fits every tokenizer.
        tokenizer: The tokenizer that is to be used with the target.

    Raises:
        ValueError: If the tokens or their ids differ.
    """
    # The head may have come with older code of its own
    expected = getattr(config, "target_vocab_hash", None)
    if expected is None:
        return
    if (got := vocabulary_hash(tokenizer)) != expected:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        owner = f" of {config.target_model_name!r}" if config.target_model_name else ""
        raise ValueError(
            f"this FSPAD head was trained with another vocabulary: the head has target_vocab_hash={expected}, the "
            f"tokenizer {name!r} has {got}. Use the tokenizer{owner} that the head was trained with, without added "
            "tokens; to train the head for this tokenizer, set `head.config.target_vocab_hash = None` first."
        )


def record_target(config: FSPADConfig, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write into a head's configuration what it does not say yet about the target that it is trained for.

    Args:
        config: The head's configuration, changed in place.
        target: The target.
        tokenizer: Its tokenizer, if there is one.
    """
    if config.target_revision is None and config.target_model_name == target_id(target.config):
        config.target_revision = target_revision(target.config)
    if getattr(config, "target_vocab_hash", None) is None and tokenizer is not None:
        config.target_vocab_hash = vocabulary_hash(tokenizer)
    if getattr(config, "target_weights", None) is None:
        config.target_weights = sample_weights(target)
