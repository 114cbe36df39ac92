"""A head may come from anybody: what its code may do, what its files may make a process do, and what is refused."""

import ast
import shutil
from pathlib import Path

import pytest

import fspad
from helpers import fresh

CODE = sorted(Path(fspad.__file__).parent.glob("*.py"))

# What remote code may import and call. All of it is pure computation, except for asking `os` about folders.
STANDARD_LIBRARY = {
    "__future__",
    "collections",
    "contextlib",
    "contextvars",
    "copy",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "inspect",
    "itertools",
    "json",
    "math",
    "os",
    "re",
    "reprlib",
    "threading",
    "time",
    "typing",
    "warnings",
    "weakref",
}
OF_OS = {"PathLike", "fspath", "listdir", "path"}
# Saving writes a copy of the first file beside a head; the second looks for the installed package, which pushes with a card.
EXCEPTIONS = {
    "custom_generation.py": ["import shutil", "import sys", "import pathlib.Path"],
    "checkpoint.py": ["import importlib.util", "import pathlib.Path"],
}
FORBIDDEN_NAMES = {"open", "eval", "exec", "compile", "input", "breakpoint", "globals"}
FORBIDDEN_DUNDERS = {"__import__", "__builtins__", "__loader__", "__spec__", "__globals__", "__subclasses__"}
FORBIDDEN_ATTRIBUTES = {"system", "popen", "open", "read_text", "read_bytes", "write_text", "write_bytes", "hub"}
FORBIDDEN_ATTRIBUTES |= {"load_library", "cpp_extension", "package", "save"}


def offences(source: str) -> list[str]:
    """What a code file does that remote code must not do, by reading it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        imported = []
        if isinstance(node, ast.Import):
            imported = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported = [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.level > 1 or not node.module or "." in node.module):
            found.append(f"relative import {ast.unparse(node)}")
        elif isinstance(node, ast.Name) and (node.id in FORBIDDEN_NAMES or node.id in FORBIDDEN_DUNDERS):
            found.append(f"name {node.id}")
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            bad = node.attr in FORBIDDEN_ATTRIBUTES or (owner == "os" and node.attr not in OF_OS)
            if bad or f"{owner}.{node.attr}" == "torch.load" or node.attr in FORBIDDEN_DUNDERS:
                found.append(f"attribute {owner}.{node.attr}")
        for name in imported:
            root, *rest = name.split(".")
            is_fine = root in {"torch", "transformers"} | STANDARD_LIBRARY
            if not is_fine or (root == "os" and rest and rest[0] not in OF_OS) or set(rest) & FORBIDDEN_ATTRIBUTES:
                found.append(f"import {name}")
            if name == "torch.load":
                found.append(f"import {name}")
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_code_files_compute_and_nothing_else(path):
    assert offences(path.read_text(encoding="utf-8")) == EXCEPTIONS.get(path.name, [])


@pytest.mark.parametrize(
    "source",
    [
        "import socket",
        "import numpy as np",
        "import urllib.request",
        "from subprocess import run",
        "import pickle",
        "from . import sibling",
        "from ..elsewhere import x",
        "def f():\n    import ctypes",
        "open('x')",
        "read = open",
        "eval('1')",
        "exec('1')",
        "__import__('socket')",
        "__builtins__['open']",
        "import os\nos.system('ls')",
        "import os\nos.remove('x')",
        "from os import remove",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import torch\ntorch.hub.load('x')",
        "from torch.utils import cpp_extension",
        "from pathlib import Path",
        "folder.joinpath('x').read_text()",
        "f.__globals__['x']",
    ],
)
def test_the_reader_of_code_files_finds_what_it_looks_for(source):
    assert offences(source)


def test_without_trust_no_code_is_fetched_or_run(saved_head, tmp_path):
    head = tmp_path / "head"
    head.mkdir()
    shutil.copytree(saved_head, head, dirs_exist_ok=True)
    for path in head.glob("*.py"):
        path.write_text(f"{path.read_text()}\nopen({str(tmp_path / 'mark')!r}, 'w').close()\n")
    script = """
import json, os, sys
sys.modules["fspad"] = None  # as if the package were not installed
from transformers import AutoConfig, AutoModel

def refused(loader, **options):
    try:
        loader.from_pretrained("head", **options)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
        assert not os.path.exists("mark"), "code was run"
        assert not os.path.exists("modules") or not any(files for _, _, files in os.walk("modules")), "code was copied"
        return True

assert all(refused(loader, **options) for loader in (AutoConfig, AutoModel) for options in ({}, {"trust_remote_code": False}))
config = json.load(open("head/config.json"))
good = dict(config["auto_map"])
for auto_map in ({name: "../x--y.Z" for name in good}, {name: "somebody/else--y.Z" for name in good}):
    json.dump({**config, "auto_map": auto_map}, open("head/config.json", "w"))
    assert refused(AutoModel)
json.dump(config, open("head/config.json", "w"))
AutoModel.from_pretrained("head", trust_remote_code=True)
assert os.path.exists("mark"), "the mark proves nothing"
"""
    fresh.run(script, tmp_path)
