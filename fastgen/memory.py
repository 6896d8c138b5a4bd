"""What the C library does with memory that is freed.

glibc maps large blocks one by one and gives them back when they are freed, so each large tensor is
built on fresh pages, which the kernel clears as they are touched. That costs more than most ops
that fill them: `torch.clone` of 128 MiB takes four to five times as long as on memory that was
there. Allocators such as jemalloc and tcmalloc keep what is freed; glibc does too when told so.
"""

from __future__ import annotations

import ctypes

__all__ = ["ENVIRONMENT", "keep_freed_memory"]

#: Variable of the environment, parameter of mallopt, value. No blocks of their own mapping, nothing
#: given back from the end of the heap, which grows by 64 MiB at a time.
_SETTINGS = (
    ("MALLOC_MMAP_MAX_", -4, 0),
    ("MALLOC_TRIM_THRESHOLD_", -1, -1),
    ("MALLOC_TOP_PAD_", -2, 64 << 20),
)

#: What has the effect of `keep_freed_memory` on a process that is started with it.
ENVIRONMENT = {name: str(value % 2**64) for name, _, value in _SETTINGS}


def keep_freed_memory() -> bool:
    """Lets this process keep freed memory for its next tensors, from here on.

    The resident memory of the process then stays at its peak until it ends. It is for programs that
    allocate the same sizes over and over, such as training; `fastgen train` does it. Call it before
    anything large is allocated.

    Returns:
        Whether the C library took the settings: True with glibc. With another one, such as that of
        macOS or musl, nothing happens; an allocator that was preloaded in its place is unaffected.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return all([mallopt(parameter, value) == 1 for _, parameter, value in _SETTINGS])
