"""What the commands load: targets and heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fspad
from fspad.bench.machine import default_device, native_dtype, target_dtype
from fspad.bench.smollm2 import TARGET_NAME, load_smollm2, quiet_loading
from fspad.config_checks import shorten
from fspad.provenance import as_hub_id, check_vocabulary, note_default_revision

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHIPPED_HEAD = Path("examples", "heads", "smollm2-135m-instruct")


@contextmanager
def damage_in_one_line(what: str) -> Iterator[None]:
    """Files of a model fail in any way while they are read; the command line says so in one line, whoever reads them.

    Args:
        what: What is read, for the message.

    Raises:
        ValueError: For any error that does not say by itself what is wrong.
    """
    try:
        yield
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {shorten(str(error))}"
        raise ValueError(f"{what} cannot be read, a file of it is damaged ({reason}). Download it again.") from error


def load_target(name: str | None, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a target and its tokenizer, on the accelerator if there is one.

    Args:
        name: Hub id or folder; `None` for SmolLM2-135M-Instruct without the Hub.
        dtype: Dtype of the weights; `None` for the one that a processor computes in natively, and on an accelerator for that
            of the checkpoint.

    Returns:
        The model in evaluation mode and the tokenizer.
    """
    dtype = dtype or target_dtype()
    if name is None:
        target, tokenizer = load_smollm2(None if dtype == "auto" else dtype)
    else:
        with quiet_loading(), damage_in_one_line(f"the target {name}"):
            # The name may come from a head: nobody is asked at the terminal whether its code may run
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            target = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
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


def load_head(
    name_or_path: str, dtype: torch.dtype | Literal["auto"], revision: str | None = None
) -> fspad.FSPADModel:
    """Load an FSPAD head.

    Args:
        name_or_path: Folder or Hub id.
        dtype: Dtype to run it in; "auto" for that of its weights.
        revision: Revision on the Hub.

    Returns:
        The head in evaluation mode.

    Raises:
        ValueError: If there is no head, another kind of model, or a damaged file.
    """
    try:
        with quiet_loading(), damage_in_one_line(f"the head {name_or_path}"):
            return fspad.FSPADModel.from_pretrained(name_or_path, dtype=dtype, revision=revision).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no head could be loaded from {name_or_path!r}: expected a folder that `save_pretrained` wrote, or a Hub id. "
            f"transformers says: {error}"
        ) from error


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
