"""Tensors over memory that someone else owns, such as a mapped artifact."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from memos_vllm_kernels.errors import KernelInputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def tensor_over(
    buffer: ReadableBuffer, dtype: torch.dtype, shape: Sequence[int], *, offset_bytes: int = 0
) -> torch.Tensor:
    """A tensor over a buffer, without a copy and without torch's warning for read-only memory.

    Never write to it: over a read-only mapping that kills the process. The buffer stays alive as
    long as the tensor does, so an mmap cannot be closed before.

    Args:
        buffer: an mmap, bytes, memoryview or array; contiguous.
        shape: of the tensor; row-major.
        offset_bytes: where it starts in the buffer; a multiple of the dtype's size.
    Raises:
        KernelInputError: the buffer is too short, or the offset is negative or not aligned.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    view = memoryview(buffer)
    if offset_bytes < 0 or offset_bytes % dtype.itemsize or min(shape, default=0) < 0:
        raise KernelInputError(f"no {dtype} tensor {tuple(shape)} can start at byte {offset_bytes}")
    if offset_bytes + size_bytes > view.nbytes:
        raise KernelInputError(
            f"{dtype} {tuple(shape)} needs bytes {offset_bytes} to {offset_bytes + size_bytes} "
            f"of a buffer of {view.nbytes}"
        )
    if size_bytes == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    owner = np.frombuffer(view.cast("B"), dtype=np.uint8)
    # torch warns about read-only buffers, and warnings cannot be silenced for one thread only; a
    # ctypes array counts as writable whatever memory it lies over.
    window = (ctypes.c_char * size_bytes).from_address(owner.ctypes.data + offset_bytes)
    window.owner = owner  # type: ignore[attr-defined]
    return torch.frombuffer(window, dtype=dtype).view(tuple(shape))
