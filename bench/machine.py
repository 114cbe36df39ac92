"""What a machine is called and can compute, for everything that reports a speed."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers

import fspad

# Processors that multiply in bfloat16 themselves; others convert at every step, and are slower than in float32.
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def processor_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device | str = "cpu") -> str:
    """What a model on this device runs on.

    Args:
        device: Device of the model.

    Returns:
        Name of the accelerator, or name and usable cores of the processor.
    """
    device = torch.device(device)
    if device.type == "cpu":
        # Containers and schedulers often give a process fewer cores than the machine has.
        has_affinity = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if has_affinity else (os.cpu_count() or 1)
        return f"{processor_name()}, {cores} core{'s' if cores > 1 else ''}"
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if get_name is None else get_name(device)


def describe_setup(device: torch.device | str, dtype: torch.dtype) -> dict[str, str | int]:
    """What every measured time depends on.

    Args:
        device: Device of target and head.
        dtype: Dtype of target and head.

    Returns:
        `machine`, `dtype`, `threads`, and the releases of `torch`, `transformers` and `fspad`.
    """
    return {
        "machine": describe_machine(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fspad": fspad.__version__,
    }


def default_device() -> torch.device:
    """The accelerator if there is one, else the processor."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def native_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype to run models in on a device, if nothing else asks for another one.

    Args:
        device: Where they are to run.

    Returns:
        `torch.bfloat16` where the processor or accelerator computes in it natively, else `torch.float32`.
    """
    device = torch.device(device)
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        is_native = any(can.get(name) for name in _BFLOAT16_INSTRUCTIONS)
    elif device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
        is_native = is_supported is not None and is_supported()
    return torch.bfloat16 if is_native else torch.float32


def target_dtype(device: torch.device | None = None) -> torch.dtype | str:
    """The dtype to load a target in.

    Args:
        device: Where it is to run; by default on the accelerator, if there is one.

    Returns:
        On a processor the dtype that it computes in natively, in which `fspad demo` and `fspad bench` run targets too; on
        an accelerator "auto", for that of the checkpoint.
    """
    device = device or default_device()
    return native_dtype(device) if device.type == "cpu" else "auto"
