"""The memory of this process: what it has held at most, and what becomes of what it frees."""

import contextlib
import ctypes
import pathlib
import re
import sys


def forget_peak() -> None:
    """Lets `peak` begin anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Most bytes of memory this process has held (resident set).

    Since `forget_peak` on Linux, elsewhere since it began.
    """
    with contextlib.suppress(OSError):
        status = pathlib.Path("/proc/self/status").read_text()
        if found := re.search(r"VmHWM:\s*(\d+) kB", status):  # some sandboxes leave it out
            return int(found[1]) * 1024
    import resource  # not on Windows, where predicting needs none of this

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back() -> None:
    """Returns freed memory to the system, where the C library keeps it and can be asked (glibc).

    A compiler leaves hundreds of megabytes of small freed blocks, of no use to large arrays.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed() -> None:
    """Lets this process keep what it frees, for its next arrays (glibc; elsewhere nothing happens).

    By default glibc returns large blocks to the system, which clears each page of the next one
    anew: on a CPU that took a fifth of a training step's time and more of a large prediction's.
    The process stays as large as it ever was. For the program that owns it to call, before there
    are threads.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1)):
            mallopt(option, value)
