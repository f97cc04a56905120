"""What arguments must be before anything is written."""

from __future__ import annotations

import torch

from memos_vllm_kernels.errors import KernelInputError, UnsupportedLayout
from memos_vllm_kernels.layout import PageGeometry


def check_page(
    layer: int,
    page: torch.Tensor,
    first: torch.Tensor,
    shape: tuple[int, ...],
    geometry: PageGeometry,
) -> None:
    """Raise when a layer's pages differ from the first layer's, or lie so that nothing fits."""
    if tuple(page.shape) != shape or page.dtype != geometry.dtype or page.device != first.device:
        raise KernelInputError(
            f"layer {layer} is {page.dtype} {tuple(page.shape)} on {page.device}, "
            f"expected {geometry.dtype} {shape} on {first.device}"
        )
    if page.stride(-1) != 1:
        raise UnsupportedLayout(f"layer {layer} is not contiguous along head_dim")
    if not geometry.packing.is_cpu:
        return
    if page.device.type != "cpu":
        raise UnsupportedLayout(f"layer {layer} is on {page.device} and packed for a CPU")
    if not page[:1].is_contiguous():
        raise UnsupportedLayout(f"layer {layer} has packed blocks that are not contiguous")


def check_tokens(
    name: str,
    tokens: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise KernelInputError unless these are tokens of one layer."""
    if tuple(tokens.shape) != shape:
        raise KernelInputError(f"{name} has shape {tuple(tokens.shape)}, expected {shape}")
    if tokens.dtype != dtype or tokens.device != device:
        raise KernelInputError(
            f"{name} is {tokens.dtype} on {tokens.device}, expected {dtype} on {device}"
        )
    if tokens.numel() and tokens.stride(-1) != 1:
        raise KernelInputError(f"{name} is not contiguous along its last dim: {tokens.stride()}")


def check_range(token_start: int, num_tokens: int, *, room: int) -> None:
    """Raise KernelInputError when a run of blocks does not hold these tokens."""
    if token_start < 0 or num_tokens < 0 or token_start + num_tokens > room:
        raise KernelInputError(
            f"tokens {token_start} to {token_start + num_tokens} of {room} in the blocks"
        )


def check_index(name: str, index: torch.Tensor, device: torch.device) -> None:
    """Raise KernelInputError unless it is a vector of int64 on the device."""
    if index.dtype != torch.int64 or index.dim() != 1 or index.device != device:
        raise KernelInputError(
            f"{name} is {index.dtype} {tuple(index.shape)} on {index.device}, "
            f"expected one dimension of int64 on {device}"
        )


def check_within(name: str, index: torch.Tensor, limit: int) -> None:
    """The kernels write wherever they are told, so an index out of range must not reach them.

    On a GPU this waits for the index; an index that was checked on the host before it was sent
    costs less: see `staging`.
    """
    if len(index) == 0:
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= limit:
        raise KernelInputError(f"{name} {low if low < 0 else high} is not in 0 to {limit - 1}")
