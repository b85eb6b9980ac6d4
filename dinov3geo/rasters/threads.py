"""Threads beside a network that computes: they step back, so that it loses as little time as can be."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STEP_BACK = 5
_HANDOVER_S = 0.0005


def step_back() -> None:
    """Lets the calling thread, and those that it starts, run after others where processors are short.

    Only Linux knows priorities of threads; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        lower = min(os.getpriority(os.PRIO_PROCESS, thread) + _STEP_BACK, 19)
        os.setpriority(os.PRIO_PROCESS, thread, lower)


@contextmanager
def quick_handover() -> Iterator[None]:
    """Makes threads hand over the interpreter sooner than Python's 5 ms meanwhile.

    A network gives up the interpreter in every operation and waits that long for it after each one that
    another thread has used for a calculation in Python.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _HANDOVER_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
