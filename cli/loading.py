"""What the commands load: targets, heads, and prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import fspad
from fspad.provenance import note_default_revision

from .smollm2 import load_smollm2, quiet_loading

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
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return target.to(device).eval(), tokenizer


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
    if not tokenizer.chat_template:
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
