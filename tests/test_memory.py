import subprocess
import sys

import pytest

from recsys.memory import keep_freed_memory

FAULTS = """
import resource, sys
from recsys.memory import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
import torch
def work():
    for _ in range(8):
        torch.ones(2**24)  # 64 MiB
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again_without_asking_for_it():
    if not keep_freed_memory():
        pytest.skip("this system's C library is not glibc")
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("given back", "kept")
    }
    assert faults["given back"] > 8 * 2**26 / 2**21  # at least one for each huge page
    assert faults["kept"] < faults["given back"] / 10
