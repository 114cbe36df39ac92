"""A saved head in a process where the package is not installed, and beside it."""

import json
import sys

import pytest
import torch

from helpers import fresh
from helpers.models import make_head, make_target

PREAMBLE = """
import sys
sys.modules["fspad"] = None  # as if the package were not installed
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
target = AutoModelForCausalLM.from_pretrained("target")
prompt = torch.tensor([[1, 2, 3]])
options = {"max_new_tokens": 25, "do_sample": False, "return_dict_in_generate": True}
plain = target.generate(prompt, **options).sequences
"""


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved target and two saved heads."""
    target = make_target(vocab_size=9)
    target.save_pretrained(tmp_path / "target")
    for seed in (1, 2):
        make_head(target, seed=seed).save_pretrained(tmp_path / f"head{seed}")
    return tmp_path


def test_a_saved_head_is_config_weights_and_flat_code_files(saved):
    files = {path.relative_to(saved / "head1").as_posix() for path in (saved / "head1").rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "modeling_fspad.py", "configuration_fspad.py", "hook.py"} <= files
    assert {name for name in files if "/" in name} == {"custom_generate/generate.py"}, (
        "transformers looks for it there"
    )
    assert not any("token" in name or "generation_config" in name for name in files), "those are the target's"
    config = json.loads((saved / "head1" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_fspad.FSPADConfig",
        "AutoModel": "modeling_fspad.FSPADModel",
    }


def test_code_files_import_torch_and_transformers_only(saved):
    from transformers.dynamic_module_utils import get_imports

    third_party = set()
    for path in (saved / "head1").rglob("*.py"):
        third_party |= {name for name in get_imports(path) if name not in sys.stdlib_module_names}
    assert third_party == {"torch", "transformers"}


def test_fresh_process_without_the_package(saved):
    script = """
head = AutoModel.from_pretrained("head1", trust_remote_code=True)
assert type(head).__module__.startswith("transformers_modules.")
output = target.generate(prompt, assistant_model=head, **options)
assert torch.equal(output.sequences, plain)
assert type(output).__name__ == "FSPADGenerateOutput"
print("tau", output.accept_lengths.float().mean().item() > 1)

# Saved again it still carries its code, and works
head.save_pretrained("again")
again = AutoModel.from_pretrained("again", trust_remote_code=True)
assert torch.equal(target.generate(prompt, assistant_model=again, **options).sequences, plain)

# A second head, and its hook, do no harm
other = AutoModel.from_pretrained("head2", trust_remote_code=True)
assert torch.equal(target.generate(prompt, assistant_model=other, **options).sequences, plain)
assert torch.equal(target.generate(prompt, assistant_model=head, **options).sequences, plain)
assert AutoConfig.from_pretrained("head1", trust_remote_code=True).model_type == "fspad"
"""
    assert fresh.run(PREAMBLE + script, saved).strip() == "tau True"
    code = {path.relative_to(saved / "head1") for path in (saved / "head1").rglob("*.py")}
    assert {path.relative_to(saved / "again") for path in (saved / "again").rglob("*.py")} == code


def test_without_trust_the_code_is_not_run(saved):
    script = """
try:
    AutoModel.from_pretrained("head1", trust_remote_code=False)
except ValueError as error:
    print(error)
assert not any(name.startswith("transformers_modules") for name in sys.modules)
"""
    assert "trust_remote_code=True" in fresh.run(PREAMBLE + script, saved)


def test_old_transformers_speaks_before_anything_fails(saved):
    script = """
import transformers
transformers.__version__ = "5.3.0"
try:
    AutoModel.from_pretrained("head1", trust_remote_code=True)
except ImportError as error:
    print(error)
"""
    assert "need transformers>=5.15" in fresh.run(PREAMBLE + script, saved)


def test_package_and_remote_code_in_one_process(saved):
    from transformers import AutoModel

    import fspad

    target = make_target(vocab_size=9)
    remote = AutoModel.from_pretrained(saved / "head1", trust_remote_code=True)
    local = fspad.FSPADModel.from_pretrained(saved / "head1")
    prompt = torch.tensor([[1, 2, 3]])
    plain = target.generate(prompt, max_new_tokens=20, do_sample=False)
    for head in (remote, local):
        assert torch.equal(target.generate(prompt, assistant_model=head, max_new_tokens=20, do_sample=False), plain)


def test_an_original_bin_file_is_not_loaded_as_a_head(saved):
    """Pickled weights go through `fspad convert` only."""
    from transformers import AutoModel

    folder = saved / "head1"
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError), match=r"safetensors|missing weights"):
        AutoModel.from_pretrained(folder)


def test_two_revisions_of_the_code_side_by_side(saved):
    """Both have the same configuration file, by which transformers would tell them apart, and other code elsewhere."""
    for folder, mark in (("head1", "first"), ("head2", "second")):
        file = saved / folder / "head_source.py"
        file.write_text(f"{file.read_text()}\nMARK = {mark!r}\n")
    assert (saved / "head1" / "configuration_fspad.py").read_bytes() == (
        saved / "head2" / "configuration_fspad.py"
    ).read_bytes()
    script = """
def mark(head):
    return sys.modules[type(head).__module__.rpartition(".")[0] + ".head_source"].MARK

heads = [AutoModel.from_pretrained(name, trust_remote_code=True) for name in ("head1", "head2", "head1")]
assert [mark(head) for head in heads] == ["first", "second", "first"]
assert type(heads[0]) is type(heads[2]) is not type(heads[1])
for head in heads:
    output = target.generate(prompt, assistant_model=head, **options)
    assert torch.equal(output.sequences, plain)
    assert output.accept_lengths.float().mean() > 1
    assert sys.modules[type(output).__module__].__name__.split(".")[:3] == type(head).__module__.split(".")[:3]
print("done")
"""
    assert fresh.run(PREAMBLE + script, saved).strip() == "done"
