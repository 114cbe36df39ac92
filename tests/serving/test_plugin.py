"""What vLLM loads of this package, tried without it."""

import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fspad.serving import ARCHITECTURE, plugin


def test_entry_point_imports_nothing_of_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    (entry,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "fspad"]
    assert entry.load() is plugin.register


@pytest.mark.parametrize(("is_cpu", "has_triton"), [(True, False), (True, True), (False, True)])
def test_registration(is_cpu, has_triton, monkeypatch):
    models, kernels = {}, SimpleNamespace(_expand_kernel_impl=None)
    registry = SimpleNamespace(get_supported_archs=lambda: models, register_model=models.__setitem__)
    for name, content in {
        "vllm": {"ModelRegistry": registry},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: is_cpu)},
        "vllm.triton_utils": {"HAS_TRITON": has_triton},
        "vllm.utils": {"cpu_triton_utils": kernels},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    plugin.register()
    plugin.register()  # vLLM loads plugins in each of its processes, and maybe more than once
    assert models == {ARCHITECTURE: f"fspad.serving.vllm_model:{ARCHITECTURE}"}
    assert kernels._expand_kernel_impl is (plugin.expand if is_cpu and not has_triton else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_values_of_requests_are_repeated_for_their_tokens(dtype):
    values = torch.tensor([0, 7, 9], dtype=dtype) / (2 if dtype.is_floating_point else 1)
    output = torch.full((6,), -1, dtype=dtype)
    plugin.expand(output, values, torch.tensor([1, 1, 6], dtype=torch.int32), 0, 1)
    assert output.tolist() == [1, *[values[2].item()] * 5]
