"""What is pushed of a folder with a head: a copy that strangers can use, whatever the folder lacks."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

from fspad import FSPADConfig, FSPADModel
from fspad.custom_generation import save_custom_generate

# What a repository of a head holds. All else stays at home, above all tokenizers, which are the target's, and pickles,
# which nobody should have to load to see how a head was trained.
HEAD_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "*.png",
    "*.svg",
    "adapter_config.json",
    "training_args.json",
)
# The patterns above match in sub-folders too.
NOT_HEAD_FILES = ("_*", "*/_*", "checkpoint-*", "last-checkpoint/*", "runs/*")
_NO_REPOSITORY = "REPOSITORY: str | None = None"


@contextmanager
def staged(folder: Path) -> Iterator[tuple[Path, FSPADConfig | None]]:
    """Make a copy of what is pushed of a folder, its sub-folders left out, and delete it afterwards.

    A head is loaded once, so that nothing is pushed which nobody can load. Code that is missing is added.

    Args:
        folder: Folder with a saved head, or with an adapter of one, which is copied as it is.

    Yields:
        The copy, and the configuration of the head; `None` for an adapter.

    Raises:
        FileNotFoundError: If the folder holds neither.
        ValueError: If the head cannot be loaded.
    """
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"expected a saved head, got a folder without config.json: {folder}")
    copy = Path(tempfile.mkdtemp(prefix="fspad-push-"))
    try:
        for path in folder.iterdir():
            is_ours = any(fnmatch(path.name, pattern) for pattern in HEAD_FILES) and not path.name.startswith("_")
            if path.is_file() and is_ours:
                _bring(path, copy / path.name)
        config = None
        if (folder / "config.json").is_file():
            head = FSPADModel.from_pretrained(folder, dtype="auto")
            if not has_code(copy):
                custom_object_save(head, copy, config=head.config)
                head.config.save_pretrained(copy)
            save_custom_generate(copy)
            config = head.config
        yield copy, config
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _bring(path: Path, destination: Path) -> None:
    """Copy a file; weights, which nobody changes and which may be large, without their contents where that can be."""
    if path.suffix == ".safetensors":
        try:
            os.link(path.resolve(), destination)
            return
        except OSError:
            pass
    shutil.copyfile(path, destination)


def has_code(folder: Path) -> bool:
    """Whether a folder carries all the code that `trust_remote_code=True` loads.

    Args:
        folder: Folder with a `config.json`.
    """
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
    if not {"AutoConfig", "AutoModel"} <= set(auto_map):
        return False
    files = [folder / f"{reference.partition('.')[0]}.py" for reference in auto_map.values()]
    try:
        files += [Path(file) for entry in files for file in get_relative_import_files(entry)]
    except FileNotFoundError:
        return False
    return all(file.is_file() for file in files)


def name_repository(folder: Path, repo_id: str) -> None:
    """Write into `custom_generate/generate.py` which repository it is in.

    Args:
        folder: Folder of the head.
        repo_id: The repository, with its owner.
    """
    file = folder / "custom_generate" / "generate.py"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(_NO_REPOSITORY, f"REPOSITORY: str | None = {json.dumps(repo_id)}"), encoding="utf-8")
