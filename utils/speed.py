"""Speed-ups of a training step that change its results only by rounding."""

import ctypes
import math
import os
import sys
import time

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8        # of glibc's malloc.h
MEASURE_SECONDS, MIN_ROUNDS = 2, 4          # to find out whether bfloat16 is faster
FASTER = 0.9                # of float32's time: bfloat16 has to take less than that
BF16_CUDA_CAPABILITY = 8, 0         # of Ampere, the first GPUs with bfloat16 units


def keep_freed_memory():
    """Let glibc keep the memory that a step frees for the next step. Does nothing with another C library.

    Otherwise megabytes are returned to the system at every step, and fetched again page by page.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**25)               # the largest value allowed
    _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def share_freed_memory():
    """Let the threads of a server take memory from two heaps of glibc. To be called before they start.

    Otherwise each has a heap of its own, and does not use what the others have freed.
    """
    _mallopt(M_ARENA_MAX, 2)


def _mallopt(setting, value):
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(setting, value)


def memory_format(device):
    """The memory format for images and weights on a device: channels last, in which convolutions are fastest.

    The quantizer's vectors lie in memory that way too. On MPS, where BatchNorm's gradients are wrong in it, contiguous.
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def bfloat16_support(device):
    """Whether a device has units that multiply bfloat16 numbers: True, False, or None where torch cannot tell."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_capability(device) >= BF16_CUDA_CAPABILITY
    # This variable hides units from oneDNN. torch can be asked for the processor's features from 2.8 on.
    if kind != "cpu" or "ONEDNN_MAX_CPU_ISA" in os.environ or not hasattr(torch.cpu, "get_capabilities"):
        return None
    features = torch.cpu.get_capabilities()
    return True if features.get("amx_bf16") or features.get("avx512_bf16") else None


def synchronize(device):
    """Wait until a device has done all that it was given."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def measure_step_seconds(step, device, precisions=(False, True), seconds=MEASURE_SECONDS, min_rounds=MIN_ROUNDS):
    """→ the seconds of step(), which returns a loss, and its backward pass, for each of precisions: without and with
    bfloat16 autocast.

    The minimum of each, measured in turn for about so many seconds in all, but at least min_rounds times: the first one
    warms up. No random state changes.
    """
    kind, best, start, rounds = torch.device(device).type, dict.fromkeys(precisions, math.inf), time.perf_counter(), 0
    with torch.random.fork_rng(devices=[torch.device(device)] if kind == "cuda" else []):
        while rounds < min_rounds or time.perf_counter() - start < seconds:
            for amp in precisions:
                begin = time.perf_counter()
                with torch.autocast(kind, torch.bfloat16, enabled=amp):
                    loss = step()
                loss.backward()
                synchronize(device)
                best[amp] = min(best[amp], time.perf_counter() - begin)
            rounds += 1
    return list(best.values())


def choose_bfloat16(step, device):
    """→ whether --amp takes the steps in bfloat16 on this device, and a line that says so and why."""
    support = bfloat16_support(device)
    if support is False:
        return False, f"--amp: {device} has no bfloat16 units: training in float32"
    if support:
        return True, f"--amp: training in bfloat16, for which {device} has units"
    float32, bfloat16 = measure_step_seconds(step, device)
    faster = bfloat16 < FASTER * float32
    return faster, (f"--amp: training in {'bfloat16' if faster else 'float32'}, since a small step took "
                    f"{bfloat16 * 1e3:,.1f} ms in bfloat16 and {float32 * 1e3:,.1f} ms in float32")


def compile_step(function, report):
    """function, of tensors, compiled by torch when it is first called: as one graph, with the same random numbers.

    Where that fails, mostly for lack of a C++ compiler, report(why) is called once, and function runs as it is.
    """
    try:
        compiled = torch.compile(function, fullgraph=True, dynamic=False, options={"fallback_random": True})
    except RuntimeError as error:       # torch cannot compile with this version of Python
        report(first_line(error))
        return function
    failed = False

    def call(*tensors):
        nonlocal failed
        if not failed:
            try:
                return compiled(*tensors)
            except torch._dynamo.exc.TorchDynamoException as error:
                failed = True
                report(first_line(error))
        return function(*tensors)
    return call


def first_line(error):
    """The first line of an error's message, and the second if the first ends with a colon; else the error's name."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first
