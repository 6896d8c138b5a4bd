"""What a library ships with: the examples of its README, and its own test suite. And couplings that
run fused whatever their size."""

import os
import re
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

from fastgen.integrations import _coupling

RUN_SUITE = """
import contextlib, sys, fastgen, pytest, torch

class Seeds:
    def pytest_runtest_setup(self):
        torch.manual_seed(0)

library, how = sys.argv[1:]
with fastgen.patch(library) if how == "patched" else contextlib.nullcontext():
    sys.exit(pytest.main(["-q", "-rf", "--tb=no", "--rootdir=.", "tests"], plugins=[Seeds()]))
"""


@pytest.fixture
def fused_on_cpus(monkeypatch):
    """Runs fused couplings as a GPU does also where a CPU is faster without."""
    monkeypatch.setattr(_coupling, "CPU_FROM", dict.fromkeys(_coupling.CPU_FROM, 0))


@pytest.fixture
def readme_examples():
    """Distribution name -> the Python examples of its description."""

    def examples(distribution):
        description = metadata.metadata(distribution)
        text = description.get_payload() or description["Description"]
        return re.findall(r"```python\n(.*?)```", text, re.DOTALL)

    return examples


@pytest.fixture
def own_suite(tmp_path):
    """(library, "name-version", "patched" or "plain") -> which tests of the suite in its source
    distribution fail, and how many pass; each test under the same seed."""
    folder = os.environ.get("FASTGEN_PEER_SDISTS")
    if not folder:
        pytest.skip("FASTGEN_PEER_SDISTS names no folder of source distributions")

    def outcome(library, release, how):
        with tarfile.open(Path(folder) / f"{release}.tar.gz") as archive:
            tests = [m for m in archive.getmembers() if m.name.startswith(f"{release}/tests/")]
            archive.extractall(tmp_path, tests, filter="data")
        command = [sys.executable, "-c", RUN_SUITE, library, how]
        run = subprocess.run(command, cwd=tmp_path / release, capture_output=True, text=True)
        passed = re.search(r"(\d+) passed", run.stdout)
        assert passed, run.stdout[-3000:] + run.stderr[-3000:]
        return set(re.findall(r"FAILED.*?(tests/\S+::\S+)", run.stdout)), int(passed[1])

    return outcome
