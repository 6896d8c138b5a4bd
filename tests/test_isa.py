"""FASTGEN_CPU_ISA chooses the code path of the CPU kernels, for `make test-isa` and for users."""

import os
import subprocess
import sys

import pytest
import torch

from fastgen.ops import _library

PROGRAM = "import torch, fastgen; print(torch.ops.fastgen.cpu_isa())"


def process(value):
    environment = {**os.environ, "FASTGEN_CPU_ISA": value}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )


def test_this_run_is_on_the_chosen_set():
    chosen = (
        os.environ.get("FASTGEN_CPU_ISA") or _library.CPU_ISAS[torch.ops.fastgen.best_cpu_isa()]
    )
    assert _library.CPU_ISAS[torch.ops.fastgen.cpu_isa()] == chosen


@pytest.mark.parametrize("name", _library.CPU_ISAS)
def test_the_variable_is_obeyed(name):
    done = process(name)
    wanted = _library.CPU_ISAS.index(name)
    if wanted <= torch.ops.fastgen.best_cpu_isa():
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(wanted)
    else:
        assert done.returncode != 0
        assert f"FASTGEN_CPU_ISA: this machine has no '{name}'" in done.stderr


def test_an_unknown_name_is_an_error():
    done = process("sse9")
    assert done.returncode != 0
    expected = "portable, avx2, avx512 or avx512bf16"
    assert f"FASTGEN_CPU_ISA: expected {expected}, got 'sse9'" in done.stderr
