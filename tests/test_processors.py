"""make test-processors: that the instructions it asks for are those that torch and its libraries then use."""

import os
import platform
import re
import sys

import pytest
import torch
from helpers import run_command

pytestmark = pytest.mark.rounding

asked_for = pytest.mark.skipif("ATEN_CPU_CAPABILITY" not in os.environ or platform.machine() not in ("x86_64", "AMD64"),
                               reason="make test-processors asks for other instructions, on x86 processors")


@asked_for
def test_torch_uses_the_vector_instructions_asked_for():
    assert torch.backends.cpu.get_cpu_capability() == os.environ["ATEN_CPU_CAPABILITY"].upper()


@asked_for
def test_convolutions_and_products_use_the_instructions_asked_for():
    program = ("import torch; torch.conv2d(torch.randn(2, 4, 8, 8), torch.randn(4, 4, 3, 3)); "
               "torch.randn(64, 64) @ torch.randn(64, 64)")
    said = run_command(sys.executable, "-c", program, ONEDNN_VERBOSE="1", MKL_VERBOSE="1").stdout
    used = re.search(r"cpu,isa:Intel (\S+)", said)[1]
    assert used.replace(".", "") == os.environ["ONEDNN_MAX_CPU_ISA"]
    # MKL_ENABLE_INSTRUCTIONS is Intel's own and has no effect on other makes; MKL_CBWR=COMPATIBLE has, on all.
    if (mode := os.environ.get("MKL_CBWR")) and "MKL_VERBOSE" in said:
        assert f"CNR:{mode} " in said
