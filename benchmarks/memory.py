"""The most memory that one call held.

On a GPU the allocator counts. On a CPU PyTorch's allocator does not, and would miss what kernels
and other libraries allocate behind its back. Linux does count what is resident: freed heap is given
back (malloc_trim), the high-water mark is reset (/proc/self/clear_refs), and after the call the
mark is compared with what was resident before. That holds everything the call touched, its results
included, exact to some pages; and not what it allocated and never touched.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None, f"{_STATUS} has no {field}"
    return int(found[1]) * 1024


def _reset_high_water() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(function: Callable[[], Any], device: torch.device) -> float:
    """Bytes that a call of `function` held at most, above what was there before.

    Returns:
        NaN on a CPU where the system has no /proc/self/clear_refs (other than Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    if not _reset_high_water():
        return float("nan")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _reset_high_water()
    before = _resident("VmRSS")
    result = function()
    peak = _resident("VmHWM")
    del result
    return float(max(0, peak - before))
