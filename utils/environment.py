"""What a run's figures depend on beside its arguments: versions, device, processor, threads."""

import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from utils import distributed

AFFECTS_ROUNDING = "torch", "device", "processor", "threads", "processes"


def environment(device, step=0):
    """The environment as strings, and the training step from which on it was used."""
    try:
        torchvision = version("torchvision")
    except PackageNotFoundError:        # optional: only downloaded data sets need it
        torchvision = "none"
    if torch.device(device).type == "cuda":
        device = torch.cuda.get_device_name(device)
    return {"from_step": str(step), "python": platform.python_version(), "torchvision": torchvision,
            "torch": str(torch.__version__), "device": device, "processor": processor(),
            "threads": str(torch.get_num_threads()), "processes": str(distributed.world_size())}


def processor():
    """The processor's name, and the widest vector instructions that torch uses on it."""
    name = None
    with suppress(OSError), open("/proc/cpuinfo") as file:
        if sys.platform == "linux":
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), None)
    return f"{name or platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
