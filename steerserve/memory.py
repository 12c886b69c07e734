"""Settings of the C allocator for long runs.

glibc hands large buffers back to the kernel as soon as they are freed, and every new one is then faulted in and zeroed
page by page. A forward allocates and frees such buffers at every layer: on two CPU cores these page faults took 30 to
40 % of the time of training and part of that of inference. Kept in the process, the buffers are simply used again.
"""

import ctypes
import os
import sys

# Parameter numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 500_000_000
"""How much the heap grows at once; address space only, pages count from the first write."""


def keep_freed_memory() -> bool:
    """Keep freed memory in the process; call it before torch allocates. Returns whether anything was changed.

    Nothing happens where the C library is not glibc, or where the caller has set MALLOC_* variables.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: TOP_PAD_BYTES}  # -1: never trim
    return all([libc.mallopt(parameter, value) == 1 for parameter, value in settings.items()])
