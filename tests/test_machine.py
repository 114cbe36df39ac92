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
