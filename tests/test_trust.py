"""A head may come from anybody: what its code may do, what its files may make a process do, and what is refused."""

import ast
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_head, make_target
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import fspad
from fspad import FSPADConfig, FSPADModel
from fspad.config_checks import MOST

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved head, not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "head"
    make_head(make_target(), draft_vocab_size=20).save_pretrained(folder)
    return folder


@pytest.fixture
def head_folder(saved, tmp_path):
    """A copy of a saved head, to be changed; without code files."""
    folder = tmp_path / "head"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((saved / name).read_bytes())
    return folder


def edit(folder: Path, **fields) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_without_trust_no_code_is_fetched_or_run(saved, tmp_path):
    head = tmp_path / "head"
    head.mkdir()
    shutil.copytree(saved, head, dirs_exist_ok=True)
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
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr


class Malicious:
    """Writes a file while it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}, {"weights_only": False}])
@pytest.mark.parametrize("loader", [FSPADModel, AutoModel])
def test_pickled_weights_are_not_loaded(loader, options, head_folder, tmp_path, monkeypatch):
    (head_folder / "model.safetensors").unlink()
    torch.save({"fc.weight": Malicious(tmp_path / "mark")}, head_folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises(OSError, match=r"safetensors files only; `fspad convert`"):
        loader.from_pretrained(head_folder, **options)
    assert not (tmp_path / "mark").exists()


def write_index(folder: Path, file: str) -> None:
    names = list(load_file(folder / "model.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", ["float32", None])
def test_an_index_cannot_name_a_pickle(dtype, head_folder, monkeypatch):
    edit(head_folder, dtype=dtype)
    write_index(head_folder, "weights.bin")
    torch.save(load_file(head_folder / "model.safetensors"), head_folder / "weights.bin")
    (head_folder / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises(ValueError, match=r"expected weights in safetensors files, got .*weights\.bin"):
        FSPADModel.from_pretrained(head_folder)


@pytest.mark.parametrize("absolute", [True, False])
def test_an_index_cannot_point_out_of_the_folder(absolute, head_folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    write_index(head_folder, str(outside) if absolute else "../outside.safetensors")
    (head_folder / "model.safetensors").rename(outside)
    with pytest.raises(ValueError, match="index points elsewhere"):
        FSPADModel.from_pretrained(head_folder)


def test_sharded_heads_are_loaded(tmp_path):
    head = make_head(make_target())
    head.save_pretrained(tmp_path, max_shard_size="10KB")
    assert not (tmp_path / "model.safetensors").exists()
    loaded = FSPADModel.from_pretrained(tmp_path)
    for name, value in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_distributed_checkpoints_are_refused(head_folder):
    (head_folder / "model.safetensors").rename(head_folder / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="got a distributed checkpoint"):
        FSPADModel.from_pretrained(head_folder)


# Sizes within the limits that the weights do not have: hundreds of gigabytes, if they were allocated
LIES = {
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_attention_heads": 2**10,
    "num_key_value_heads": 4,
    "head_dim": 2**12,
    "draft_vocab_size": 97,
    "attention_bias": True,
    "feature_sampling": False,
    "partial_alignment": False,
}


@pytest.mark.parametrize("field", LIES)
def test_sizes_that_the_weights_do_not_have_are_refused(field, head_folder):
    edit(head_folder, **{field: LIES[field]})
    with pytest.raises(
        ValueError, match=r"does not match its config\.json: .*(instead of|weights \['.*\.(bias|weight))"
    ):
        AutoModel.from_pretrained(head_folder)


@pytest.mark.parametrize("kept", [0, 1])
def test_nothing_is_allocated_for_missing_weights(kept, head_folder, monkeypatch):
    weights = load_file(head_folder / "model.safetensors")
    save_file(dict(list(weights.items())[:kept]), head_folder / "model.safetensors", metadata={"format": "pt"})
    edit(head_folder, hidden_size=2**16, intermediate_size=2**18)
    monkeypatch.setattr(FSPADModel, "_move_missing_keys_from_meta_to_device", lambda *args: pytest.fail("allocated"))
    with pytest.raises(ValueError, match="missing weights"):
        FSPADModel.from_pretrained(head_folder)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (torch.arange(20) + 90, "distinct token ids from 0 to 96"),
        (torch.arange(20) - 1, "distinct token ids from 0 to 96"),
        (torch.zeros(20, dtype=torch.long), "1 of them distinct"),
        (torch.arange(20.0), "floats of shape"),
    ],
)
def test_draft_vocabularies_of_the_file_are_checked(token_ids, message, head_folder):
    weights = load_file(head_folder / "model.safetensors")
    weights["draft_vocab_ids"] = token_ids
    save_file(weights, head_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        FSPADModel.from_pretrained(head_folder)


CLEAN = FSPADConfig.from_target(make_target().config, draft_vocab_size=20).to_dict()
VALUES = [
    *(10**12, 2**63, 10**400, 2**24, 2**16, -1, -(10**12), 0, 1, 2, 3, 7, 1.5, 1e308, -0.5, math.nan, math.inf),
    *(True, False, None, "", "x", "32", "../../etc/passwd", "x" * 5000, "a\nb", "os", "load", "relu", "dynamic"),
    *([], [1], [[1]], [None], ["x"] * 3, {}, {"a": {"b": [1]}}, {"rope_type": "yarn"}, {"__float__": "NaN"}),
]


def assert_harmless(config: FSPADConfig) -> None:
    """A configuration that was accepted makes a head of bounded size, whose positions can be computed."""
    for name, most in MOST.items():
        if name == "num_draft_tokens" and config.num_draft_tokens == "auto":
            continue
        assert isinstance(getattr(config, name), int)
        assert getattr(config, name) <= most
    positions = torch.tensor([[0, 1, config.max_position_embeddings, config.max_position_embeddings + 7]])
    cos, _ = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    assert cos.shape == (1, 4, config.head_dim)
    json.dumps(config.to_dict())
    assert config._attn_implementation is None


def load_config(fields: dict) -> FSPADConfig | None:
    """The configuration in a `config.json`, or `None` if a `ValueError` says what is wrong with it."""
    fields = json.loads(json.dumps(fields))
    try:
        return FSPADConfig.from_dict(fields)
    except ValueError as error:
        if not 10 < len(str(error)) < 500:
            pytest.fail(f"not a clear message: {error}")
        return None


@pytest.mark.parametrize("field", [*FSPADConfig.__annotations__, "dtype", "torch_dtype", "architectures", "auto_map"])
def test_every_value_of_every_field_is_refused_or_harmless(field):
    configs = [config for value in VALUES if (config := load_config({**CLEAN, field: value})) is not None]
    assert len(configs) < len(VALUES), "nothing is refused"
    for config in configs:
        assert_harmless(config)
        with torch.device("meta"):
            FSPADModel(config)


ROPE_TYPES = ["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional", "axial", None, 5, [], {}]
ROPE_VALUES = [None, True, -1, 0, 1, 2, 1e-300, 1e-6, 1e15, 1e308, 10**400, math.nan, "x", [], [0.0] * 4, {}, {"a": 1}]
ROPE_FIELDS = {
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "truncate": True,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "partial_rotary_factor": 1.0,
}


@pytest.mark.parametrize("rope_type", ROPE_TYPES, ids=str)
def test_rope_parameters_are_refused_or_harmless(rope_type):
    good = {"rope_type": rope_type, **ROPE_FIELDS}
    is_known = rope_type in ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
    assert (load_config({**CLEAN, "rope_parameters": good}) is not None) == is_known
    if not is_known:
        return
    for name in [*ROPE_FIELDS, "type", "full_attention", "mrope_section"]:
        without = {key: value for key, value in good.items() if key != name}
        for rope in [without, *({**good, name: value} for value in ROPE_VALUES)]:
            if (config := load_config({**CLEAN, "rope_parameters": rope})) is not None:
                assert_harmless(config)


# Words with a meaning for transformers, and every attribute that a value could take the place of
FOREIGN = sorted({name for name in dir(FSPADConfig) if not name.startswith("__")} - set(FSPADConfig.__annotations__))
FOREIGN += ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "quantization_config"]
FOREIGN += [
    "transformers_weights",
    "distributed_config",
    "fusion_config",
    "layer_types",
    "sliding_window",
    "rope_theta",
]
FOREIGN += ["experts_implementation", "gradient_checkpointing", "tie_word_embeddings", "_name_or_path", "__class__"]
KNOWN = {"dtype", "torch_dtype", "architectures", "auto_map", "transformers_version", "model_type"}


@pytest.mark.parametrize("value", [5, True, "kernels/of-somebody", "../outside.safetensors", 10**9, {"a": 1}, [1]])
def test_fields_that_a_head_does_not_have_do_nothing(value):
    clean = vars(FSPADConfig.from_dict(dict(CLEAN)))
    fields = dict.fromkeys(set(FOREIGN) - KNOWN, value)
    assert len(fields) > 60
    assert vars(load_config({**CLEAN, **fields})) == clean


def test_random_configurations_are_refused_or_harmless():
    rng = random.Random(0)

    def draw(depth=0):
        kind = rng.randrange(9 if depth < 2 else 7)
        if kind == 7:
            return [draw(depth + 1) for _ in range(rng.randrange(4))]
        if kind == 8:
            return {rng.choice([*ROPE_FIELDS, "rope_type", "x"]): draw(depth + 1) for _ in range(rng.randrange(4))}
        integer = rng.choice([-1, 1]) * rng.choice([rng.randrange(100), 2 ** rng.randrange(70)])
        text = rng.choice(["", "silu", "llama3", "float32", "../" * rng.randrange(9), chr(rng.randrange(0xD000)) * 9])
        return [integer, integer, integer / 7, text, rng.choice([True, False]), None, rng.choice(VALUES)][kind]

    fields = [*FSPADConfig.__annotations__, *KNOWN - {"model_type"}, "attn_implementation", "num_labels"]
    accepted = 0
    for _ in range(600):
        config = load_config({**CLEAN, **{rng.choice(fields): draw() for _ in range(rng.randint(1, 3))}})
        if config is not None:
            accepted += 1
            assert_harmless(config)
    assert 20 < accepted < 400


@pytest.mark.parametrize("value", [[], [1], "x", 5, None])
def test_a_config_that_is_no_dictionary_is_refused(value):
    with pytest.raises(ValueError, match="holds a dictionary"):
        FSPADConfig.from_dict(value)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 10**12},
        {"vocab_size": 10**12},
        {"head_dim": -4},
        {"num_attention_heads": 0},
        {"num_draft_tokens": 10**9},
        {"draft_vocab_size": "many"},
        {"rms_norm_eps": math.nan},
        {"hidden_act": "os.system"},
        {"dtype": "load"},
        {"rope_parameters": {"rope_type": "yarn", "factor": "x"}},
        {"auto_map": {"AutoConfig": "configuration_fspad.FSPADConfig", "AutoModel": ["x"]}},
    ],
    ids=str,
)
def test_bad_values_are_refused_on_every_way_in(fields, head_folder):
    edit(head_folder, **fields)
    for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained, FSPADModel.from_pretrained):
        with pytest.raises(ValueError, match=next(iter(fields)).replace("rope_parameters", "rope")):
            load(head_folder)


def test_what_a_config_says_beyond_the_head_does_not_change_what_is_loaded(head_folder, tmp_path):
    expected = FSPADModel.from_pretrained(head_folder)
    other = {name: torch.zeros_like(value) for name, value in expected.state_dict().items()}
    save_file(other, tmp_path / "outside.safetensors", metadata={"format": "pt"})
    torch.save(other, head_folder / "adapter_model.bin")
    for weights in ("../outside.safetensors", "adapter_model.bin"):
        edit(
            head_folder,
            attn_implementation="somebody/kernel",
            _attn_implementation="somebody/kernel",
            transformers_weights=weights,
            quantization_config={"quant_method": "gptq", "bits": 4},
            num_labels=10**9,
            target_model_name="../../etc/passwd",
            auto_map={"AutoConfig": "../x--y.Z", "AutoModel": "../x--y.Z"},
        )
        head = AutoModel.from_pretrained(head_folder)
        assert type(head) is FSPADModel
        assert head.config._attn_implementation in ("sdpa", "eager")
        for name, value in expected.state_dict().items():
            assert torch.equal(head.state_dict()[name], value), name


def test_knobs_of_the_caller_are_taken(head_folder):
    head = AutoModel.from_pretrained(head_folder, attn_implementation="eager", num_draft_tokens=3, dtype="bfloat16")
    assert (head.config._attn_implementation, head.config.num_draft_tokens) == ("eager", 3)
    assert head.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="num_draft_tokens must be an integer from 1 to 1024"):
        AutoModel.from_pretrained(head_folder, num_draft_tokens=10**9)


@pytest.mark.parametrize("knob", ["num_draft_tokens", "draft_depth", "draft_top_k"])
def test_knobs_without_bound_are_refused_while_generating(knob):
    head = make_head(target := make_target())
    setattr(head.config, knob, 10**9)
    with pytest.raises(ValueError, match=f"{knob} must be an integer from"):
        target.generate(torch.tensor([[1, 2]]), assistant_model=head, max_new_tokens=3)
