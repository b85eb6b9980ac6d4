import os
import subprocess
import sys

import pytest

# Page faults of a 64 MiB block taken and given back twenty times, before and after.
FAULTS = """
import resource, sys
import torch
from dinov3geo.allocator import keep_freed_memory

def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

before, changed, _ = faults(), keep_freed_memory(), faults()
print(before, int(changed), faults())
"""


def run(**environment: str) -> tuple[int, bool, int]:
    clean = {
        k: v for k, v in os.environ.items() if k != "LD_PRELOAD" and "MALLOC" not in k and "GLIBC" not in k
    }
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=clean | environment, capture_output=True, text=True, check=True
    )
    before, changed, after = map(int, done.stdout.split())
    return before, bool(changed), after


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt belongs to glibc")
def test_large_blocks_are_kept():
    before, changed, after = run()
    if not changed:
        pytest.skip("this C library has no mallopt")
    assert before > 20 * 100
    assert after < before / 100


def test_the_users_own_choice_stands():
    assert not run(MALLOC_TRIM_THRESHOLD_="131072")[1]
