"""make test-processors: torch and its libraries use the vector instructions that it requests."""

import os
import platform
import re
import sys

import pytest
import torch
from helpers import run_command

pytestmark = pytest.mark.rounding

limited_instructions = pytest.mark.skipif(
    "ATEN_CPU_CAPABILITY" not in os.environ or platform.machine() not in ("x86_64", "AMD64"),
    reason="only for make test-processors on x86")


@limited_instructions
def test_torch_uses_the_requested_vector_instructions():
    assert torch.backends.cpu.get_cpu_capability() == os.environ["ATEN_CPU_CAPABILITY"].upper()


@limited_instructions
def test_onednn_and_mkl_use_the_requested_instructions():
    program = ("import torch; torch.conv2d(torch.randn(2, 4, 8, 8), torch.randn(4, 4, 3, 3)); "
               "torch.randn(64, 64) @ torch.randn(64, 64)")
    stdout = run_command(sys.executable, "-c", program, ONEDNN_VERBOSE="1", MKL_VERBOSE="1").stdout
    isa = re.search(r"cpu,isa:Intel (\S+)", stdout)[1]
    assert isa.replace(".", "") == os.environ["ONEDNN_MAX_CPU_ISA"]
    # MKL_ENABLE_INSTRUCTIONS affects only Intel processors, MKL_CBWR=COMPATIBLE affects all.
    if (mode := os.environ.get("MKL_CBWR")) and "MKL_VERBOSE" in stdout:
        assert f"CNR:{mode} " in stdout
