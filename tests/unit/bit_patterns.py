"""Numbers drawn bit by bit, and compared bit by bit: NaN payloads and denormals among them."""

from __future__ import annotations

import torch

from memos_vllm_kernels.layout import INTEGER_OF_WIDTH


def any_bits(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Every pattern that the dtype's bits can take."""
    integer = INTEGER_OF_WIDTH[dtype.itemsize]
    limits = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(
        limits.min, limits.max, shape, generator=generator, dtype=integer, device="cpu"
    )
    return drawn.to(torch.get_default_device()).view(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What `torch.equal` compares without taking two NaNs for different numbers."""
    return tensor.contiguous().view(INTEGER_OF_WIDTH[tensor.element_size()])
