"""Getting pages into memory before they are needed."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

import torch

# Linux 5.14; the mmap module does not name it.
_MADV_POPULATE_WRITE = 23


def populate(tensor: torch.Tensor) -> bool:
    """Have the system back a tensor's memory now, as a first write to it would; changes no byte.

    A fresh page costs 1.6 us when a copy runs into it, which more than doubles the time of an
    import (one Sapphire Rapids core). Releases the GIL; safe beside anyone who reads or writes.

    Args:
        tensor: contiguous; nothing is done for one that is not in the CPU's memory.
    Returns:
        Whether it is backed: False where the system cannot do it ahead, or has no memory left.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return tensor.device.type != "cpu"
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - start
    madvise = _madvise()
    if madvise is None or size <= 0:
        return size <= 0
    return bool(madvise(start, size, _MADV_POPULATE_WRITE) == 0)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
