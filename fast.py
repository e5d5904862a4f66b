"""What makes a step of a training faster, and changes nothing in what it learns but its rounding."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # of glibc's malloc.h


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
    """The first line of an error's message, or the error's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
