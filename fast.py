"""What makes a step of a training faster, and changes nothing in what it learns but its rounding."""

import ctypes
import os
import platform
import sys
import time
from contextlib import suppress

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # of glibc's malloc.h
MEASURE_SECONDS = 2         # to find out whether bfloat16 is faster
MARGIN = 0.9                # of float32's time: less than that counts as faster
BF16_CUDA_CAPABILITY = 8, 0         # of Ampere, the first GPUs with bfloat16 units


def keep_freed_memory():
    """Ask the C library to keep what a step frees for the next step. Does nothing where it is not glibc.

    Else the system gets megabytes back at every step, and gives them out again page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2**25)            # the highest it takes
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def layout(device):
    """The memory layout for images and weights on a device: channels last, in which convolutions are fastest.

    It is the quantizer's own too. On MPS BatchNorm's gradients are wrong in it, so that there it is the usual one.
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def bfloat16_support(device):
    """Whether a device has units that multiply bfloat16 numbers: True, False, or None where torch cannot tell."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_capability(device) >= BF16_CUDA_CAPABILITY
    # What oneDNN is not to use, as this variable says, does not help. torch asks for the features from 2.8 on.
    if kind != "cpu" or "ONEDNN_MAX_CPU_ISA" in os.environ or not hasattr(torch.cpu, "get_capabilities"):
        return None
    features = torch.cpu.get_capabilities()
    return True if features.get("amx_bf16") or features.get("avx512_bf16") else None


def step_seconds(step, device, seconds=MEASURE_SECONDS):
    """Seconds that step(), which gives a loss, and the backward pass take in float32 and with bfloat16 autocast.

    The shortest of each, measured in turn for about so many seconds in all. No random state changes.
    """
    kind, best, start = torch.device(device).type, [float("inf")] * 2, time.perf_counter()
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(kind, lambda: None)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if kind == "cuda" else []):
        while time.perf_counter() - start < seconds:
            for amp in (False, True):
                begin = time.perf_counter()
                with torch.autocast(kind, torch.bfloat16, enabled=amp):
                    loss = step()
                loss.backward()
                wait()
                best[amp] = min(best[amp], time.perf_counter() - begin)
    return best


def choose_bfloat16(step, device):
    """Whether a training that was asked for --amp takes its steps in bfloat16, and a line that says so and why."""
    support = bfloat16_support(device)
    if support is False:
        return False, f"--amp: {device} has no bfloat16 units: training in float32"
    if support:
        return True, f"--amp: training in bfloat16, for which {device} has units"
    float32, bfloat16 = step_seconds(step, device)
    faster = bfloat16 < MARGIN * float32
    return faster, (f"--amp: training in {'bfloat16' if faster else 'float32'}, since a small step took "
                    f"{bfloat16 * 1e3:,.1f} ms in bfloat16 and {float32 * 1e3:,.1f} ms in float32")


def processor():
    """The processor's name, and the widest vector instructions that torch uses on it."""
    name = None
    with suppress(OSError), open("/proc/cpuinfo") as file:
        if sys.platform == "linux":
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), None)
    return f"{name or platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def compiled(function, say):
    """function, of tensors, compiled by torch when it is first called: as one graph, with the same random draws.

    Where that fails, for want of a C++ compiler above all, say() is told why, once, and the function runs as it is.
    """
    try:
        fast = torch.compile(function, fullgraph=True, dynamic=False, options={"fallback_random": True})
    except RuntimeError as error:       # torch knows no compiling for this version of Python
        say(first_line(error))
        return function
    failed = False

    def call(*tensors):
        nonlocal failed
        if not failed:
            try:
                return fast(*tensors)
            except torch._dynamo.exc.TorchDynamoException as error:
                failed = True
                say(first_line(error))
        return function(*tensors)
    return call


def first_line(error):
    """The first line of an error's message, with the next where it announces one; without a message, its name."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first
