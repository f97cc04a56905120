"""Memory that a thread uses again for each layer.

Fresh memory of a megabyte comes from the system page by page, which takes longer than what is
done with it.
"""

from __future__ import annotations

import threading

import torch

_own = threading.local()


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor, valid until this thread asks for the same purpose again."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    memory: torch.Tensor | None = getattr(_own, purpose, None)
    if memory is None or len(memory) < num_bytes:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        setattr(_own, purpose, memory)
    return memory[:num_bytes].view(dtype).view(shape)
