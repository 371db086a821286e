"""What a process does with memory that it frees."""

import platform
import subprocess
import sys

import pytest

PAGES = """
import resource, sys
from d3epth_jax import memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    memory.keep_freed()
for _ in range(2):
    before = faults()
    b'1' * 2**25  # 8192 pages of 4 KiB
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is what is asked")
def test_kept_memory_is_not_fetched_from_the_system_again():
    keep, give_back = (
        int(subprocess.check_output([sys.executable, "-c", PAGES, word], text=True))
        for word in ("keep", "give back")
    )
    assert keep < 100 < 1000 < give_back
