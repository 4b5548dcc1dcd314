"""What the aggregator's command does to its process; in a process of its own, for it cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

LEFT = """
import sys
from aggregator.process import SWITCH_SECONDS, tune

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "tuned":
    tune()
    assert abs(sys.getswitchinterval() - SWITCH_SECONDS) < 1e-6
before = held()
bytes(4_000_000)  # after a block of this size has gone, glibc puts the next ones into its heap
keep = []
for _ in range(8):
    blocks = [bytes(4_000_000) for _ in range(5)]
    keep.append(bytes(200_000))  # what stays behind each
    del blocks
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library gives memory back by its own rules")
def test_what_large_messages_took_is_given_back() -> None:
    left = {
        how: int(subprocess.run([sys.executable, "-c", LEFT, how], capture_output=True, check=True).stdout)
        for how in ("tuned", "as it comes")
    }
    assert left["tuned"] < 5_000_000 < left["as it comes"]
