"""What machines are called."""

import os
import types

import pytest
import torch

from fspad.bench import machine


@pytest.mark.parametrize(("cores", "text"), [({0}, "1 core"), ({1, 5, 6}, "3 cores")])
def test_processor_with_the_cores_that_may_be_used(monkeypatch, cores, text):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    monkeypatch.setattr(machine, "processor_name", lambda: "Some CPU")
    assert machine.describe_machine() == f"Some CPU, {text}"


def test_processor_name_is_one_line():
    name = machine.processor_name()
    assert name == name.strip()
    assert name
    assert "\n" not in name


@pytest.mark.parametrize(("named", "text"), [(True, "Some GPU"), (False, "cuda")])
def test_accelerator_by_its_name(monkeypatch, named, text):
    module = types.SimpleNamespace(**({"get_device_name": lambda device: "Some GPU"} if named else {}))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert machine.describe_machine("cuda:1") == text


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"architecture": "x86_64", "avx512_bf16": True}, torch.bfloat16),
        ({"architecture": "x86_64", "amx_bf16": True}, torch.bfloat16),
        ({"architecture": "arm64", "bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_native_dtype_of_a_processor(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert machine.native_dtype() == machine.native_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize("is_native", [True, False])
def test_native_dtype_of_cuda_is_not_emulated(monkeypatch, is_native):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation and is_native
    )
    assert machine.native_dtype("cuda:1") == (torch.bfloat16 if is_native else torch.float32)


@pytest.mark.parametrize("tells", [True, False])
def test_native_dtype_of_other_accelerators(monkeypatch, tells):
    module = types.SimpleNamespace(**({"is_bf16_supported": lambda: True} if tells else {}))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert machine.native_dtype("xpu") == (torch.bfloat16 if tells else torch.float32)


def test_setup_tells_what_times_depend_on(monkeypatch):
    monkeypatch.setattr(machine, "describe_machine", lambda device: f"Some {device}")
    setup = machine.describe_setup("cpu", torch.bfloat16)
    assert list(setup) == ["machine", "dtype", "threads", "torch", "transformers", "fspad"]
    assert (setup["machine"], setup["dtype"], setup["threads"]) == ("Some cpu", "bfloat16", torch.get_num_threads())
