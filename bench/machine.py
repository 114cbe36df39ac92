"""What a machine is called, for everything that reports a speed."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


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
