"""What becomes of the memory that a process frees: some percent of a training step on a CPU, and more."""

import ctypes
import mmap
import platform
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of glibc's `mallopt`."""
_LARGEST = 2**31 - 1
_MMAPS, _LARGEST_THRESHOLD = 2**16, 2**25
"""The default of the one, and what the other grows to by itself."""
_HUGE_PAGE = 2**21


@cache
def keep_freed_memory() -> bool:
    """Lets this process use again what it has freed, up to 2 GiB, in place of giving it back; True where that is so.

    A step makes and frees the same large tensors as the last one. glibc gets each of them from the kernel as fresh
    pages, which must be zeroed, and returns them at once. Here they come from a heap of 2 GiB that is kept, in huge
    pages where the kernel has them (`madvise`); what does not fit into it is got and given back as ever. Nothing is
    computed otherwise. Elsewhere than on Linux with glibc nothing changes.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, _LARGEST)):
        return False
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # Addresses only: no page is there before it is written to. The whole must stay below the threshold of trimming.
    # Once freed it is the end of the heap, which serves what it can before anything is got from the kernel.
    size = _LARGEST // 16 * 15
    start = libc.malloc(size)
    if start is not None:
        first, last = -(-start // _HUGE_PAGE) * _HUGE_PAGE, (start + size) // _HUGE_PAGE * _HUGE_PAGE
        libc.madvise(first, last - first, mmap.MADV_HUGEPAGE)
        libc.free(start)
    return bool(libc.mallopt(_MMAP_MAX, _MMAPS) and libc.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD))
