"""The kernels take as many threads as PyTorch is set to: one inside DataLoader workers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="threads are counted in /proc"
)


def counts(*arguments):
    script = Path(__file__).with_name("thread_counts.py")
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_set_num_threads_is_respected():
    assert set(counts("set", "1").values()) == {0}


def test_more_threads_are_used_and_counted():
    """Without this, the count could be blind. No kernel takes more than it may."""
    added = counts("set", "3")
    assert max(added.values()) == 2, added


@pytest.mark.parametrize("start", ("fork", "spawn"))
def test_one_thread_in_a_loader_worker(start):
    for threads, added in counts("loader", start):
        assert threads == 1
        assert set(added.values()) == {0}
