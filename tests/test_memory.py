"""Freed memory stays with the process where that is asked for."""

import os
import platform
import subprocess
import sys

import pytest

from fastgen.memory import ENVIRONMENT

FAULTS = """
import resource, sys, torch
from fastgen.memory import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
x = torch.ones(9 << 20)
for _ in range(16):
    x.clone()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    x.clone()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments, **environment):
    """Pages that were touched for the first time in three clones of 36 MiB."""
    clean = {k: v for k, v in os.environ.items() if k not in {*ENVIRONMENT, "LD_PRELOAD"}}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**clean, **environment},
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_large_tensors_get_the_pages_of_freed_ones():
    few = 5000
    assert faults() > few, "glibc keeps 36 MiB by itself: the test shows nothing"
    assert faults("keep") < few
    assert faults(**ENVIRONMENT) < few
