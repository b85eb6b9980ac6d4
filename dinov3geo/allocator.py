"""Memory that the C library keeps instead of handing it back after every operation."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_PAD_BYTES = 64 * 2**20
# Whoever set one of these has made up their mind.
_SET_BY_USER = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Tells glibc to keep large blocks that are freed, for this process and for good.

    By default every block of 32 MiB and more comes fresh from the kernel and goes back at once, so each
    large operation on a CPU first waits for its pages to be mapped and cleared: in a virtual machine that
    can take longer than the operation. Kept memory costs no more than the peak that was reached anyway,
    and what splitting free blocks wastes.

    Returns:
        Whether anything was changed: not on other systems and C libraries, nor where the environment
        already says how to allocate (GLIBC_TUNABLES, MALLOC_..., LD_PRELOAD).

    Source: mallopt(3), M_MMAP_MAX and M_TRIM_THRESHOLD.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SET_BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    # -1 as a threshold: the largest, so never.
    wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _PAD_BYTES))
    return all(mallopt(key, value) == 1 for key, value in wanted)
