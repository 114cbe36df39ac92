"""What the commands load: targets, heads, and prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import fspad
from fspad.bench.machine import default_device, native_dtype
from fspad.bench.questions import encode_dialogue
from fspad.provenance import as_hub_id, check_vocabulary, note_default_revision

from .smollm2 import TARGET_NAME, load_smollm2, quiet_loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHIPPED_HEAD = Path("examples", "heads", "smollm2-135m-instruct")


def load_target(name: str | None, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a target and its tokenizer, on the accelerator if there is one.

    Args:
        name: Hub id or folder; `None` for SmolLM2-135M-Instruct without the Hub.
        dtype: Dtype of the weights; `None` for that of the checkpoint (float32 for SmolLM2 without the Hub).

    Returns:
        The model in evaluation mode and the tokenizer.
    """
    if name is None:
        target, tokenizer = load_smollm2(dtype)
    else:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(name)
            target = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")
        note_default_revision(target.config)
    return target.to(default_device()).eval(), tokenizer


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a command was asked for.

    Args:
        name: Its name, or "auto" for the one that suits the device.
        device: Where target and head are to run.
    """
    return native_dtype(device) if name == "auto" else getattr(torch, name)


def find_shipped_head() -> Path:
    """The head that a checkout of the repository carries.

    Returns:
        Its folder, beside the package's source or in the current directory.

    Raises:
        FileNotFoundError: If this is not run from a checkout.
    """
    roots = (Path(fspad.__file__).resolve().parent.parent, Path.cwd())
    for root in roots:
        if (root / SHIPPED_HEAD / "config.json").is_file():
            return root / SHIPPED_HEAD
    raise FileNotFoundError(
        f"no head given, and {SHIPPED_HEAD} is neither beside the package's source nor in {roots[1]}: run the demo in a "
        "checkout of the repository, or name a head with `--head PATH_OR_ID`"
    )


def load_head(name_or_path: str, dtype: torch.dtype | Literal["auto"]) -> fspad.FSPADModel:
    """Load an FSPAD head.

    Args:
        name_or_path: Folder or Hub id.
        dtype: Dtype to run it in; "auto" for that of its weights.

    Returns:
        The head in evaluation mode.

    Raises:
        ValueError: If there is no model, or another kind of model.
    """
    try:
        with quiet_loading():
            head = AutoModel.from_pretrained(name_or_path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no head could be loaded from {name_or_path!r}: expected a folder that `save_pretrained` wrote, or a Hub id. "
            f"transformers says: {error}"
        ) from error
    if not isinstance(head, fspad.FSPADModel):
        raise ValueError(
            f"expected an FSPAD head (model_type 'fspad'), got {head.config.model_type!r}: {name_or_path}"
        )
    return head.eval()


def load_pair(
    head_name: str, target_name: str | None, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, fspad.FSPADModel]:
    """Load a head and its target.

    Args:
        head_name: Folder or Hub id of the head.
        target_name: Folder or Hub id of the target; by default the one that the head was trained for.
        dtype: Dtype of both.

    Returns:
        The target, its tokenizer and the head, both models on the same device.

    Raises:
        ValueError: If the tokenizer is not that of the target that the head was trained for, or the head does not say
            which target that is.
    """
    head = load_head(head_name, dtype)
    recorded = head.config.target_model_name
    if target_name is None and recorded not in (None, TARGET_NAME):
        # A head may come from anybody, and must not say which of this machine's folders are read
        if as_hub_id(recorded) is None:
            raise ValueError(
                f"expected a head that records the Hub id of its target, got {recorded!r}: name it with `--target`."
            )
        target_name = recorded
    target, tokenizer = load_target(target_name, dtype)
    check_vocabulary(head.config, tokenizer)
    return target, tokenizer, head.to(target.device)


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a JSON-lines file.

    Args:
        path: File with one object a line; its field `prompt` is a user's message.

    Returns:
        The prompts.

    Raises:
        ValueError: If a line is no object with a text in `prompt`, or there is no line.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(json.loads(line)["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number}: expected {{"prompt": "..."}}, got {line[:80]!r}') from error
    if not prompts:
        raise ValueError(f'{path} is empty: expected lines such as {{"prompt": "..."}}')
    return prompts


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Tokenize a prompt, as a chat where the tokenizer has a template.

    Args:
        tokenizer: The target's tokenizer.
        prompt: A user's message.
        device: Device of the target.

    Returns:
        `input_ids` and `attention_mask`, of shape `(1, length)`.
    """
    return encode_dialogue(tokenizer, [prompt], [], device)
