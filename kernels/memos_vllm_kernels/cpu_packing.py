"""Learn how a CPU's pages are packed, from vLLM's own packing op.

The op is a permutation of numbers. Writing the base-64 digits of every number's own index through
it (0 to 63 are exact in fp16, bf16 and fp32) and reading the page back says where each one lies.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from memos_vllm_kernels.errors import UnsupportedLayout
from memos_vllm_kernels.layout import Packing, PageGeometry

_DIGIT_BASE = 64
_UNQUANTISED = "auto"
_WIDEST_UNIT_BYTES = 8
_learning = threading.Lock()


@dataclass(frozen=True, slots=True)
class Gather:
    """Where the keys (or the values) of one block lie.

    Numbers that are neighbours both in the page and in the canonical layout move as one unit.

    Attributes:
        index: [block_size * kv_heads * head_dim / unit] offsets from the block's start, in units;
            token-major, so that a range of tokens is a slice.
        unit_bytes: 2, 4 or 8.
    """

    index: npt.NDArray[np.intp]
    unit_bytes: int


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One block of one layer, as `pack` fills it."""

    key: Gather
    value: Gather


def pack(
    page: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    packing: Packing,
) -> None:
    """Write tokens into one layer's pages by vLLM's op. Checks nothing: see `pages`.

    Args:
        page: [num_blocks, kv_heads, block_size, 2 * head_dim], mutated; blocks contiguous.
        key, value: [tokens, kv_heads, head_dim], last dim contiguous, dtype of the page.
        slot_mapping: [tokens] int64, contiguous.
    """
    num_blocks, heads, block_size, fused = page.shape
    halves = page.view(num_blocks, heads, 2 * block_size, fused // 2)
    torch.ops._C.cpu_attn_reshape_and_cache(
        key,
        value,
        halves[:, :, :block_size],
        halves[:, :, block_size:],
        slot_mapping,
        packing.value,
        1.0,
        1.0,
        _UNQUANTISED,
    )


def learn(geometry: PageGeometry) -> BlockLayout:
    """The layout of such pages; learnt once per process, in some milliseconds.

    Raises:
        UnsupportedLayout: no packing op here, or it refuses or mangles such pages.
    """
    # One learner at a time: lru_cache alone would let two threads run the probe.
    with _learning:
        return _learn(geometry)


@lru_cache(maxsize=64)
def _learn(geometry: PageGeometry) -> BlockLayout:
    _load_op()
    heads, block_size, fused = geometry.page_shape
    # Two blocks show that blocks are packed alike and never mixed.
    source = _probe(geometry, num_blocks=2)
    count = source.numel()
    if not torch.equal(source.sort().values, torch.arange(count)):
        raise UnsupportedLayout(f"{geometry.packing.value!r} packing does not keep every number")
    offsets = torch.empty_like(source)
    offsets[source] = torch.arange(count)
    by_block = offsets.view(2, 2, block_size, heads, fused // 2)
    first = by_block[:, 0]
    if not torch.equal(by_block[:, 1], first + count // 2):
        raise UnsupportedLayout(f"{geometry.packing.value!r} packing mixes blocks")
    width = geometry.dtype.itemsize
    return BlockLayout(_gather(first[0].flatten(), width), _gather(first[1].flatten(), width))


def _gather(offsets: torch.Tensor, width: int) -> Gather:
    """Widen the unit while every group of numbers stays adjacent and aligned.

    Args:
        offsets: where each number of a block lies, in canonical order.
        width: bytes of one number.
    """
    while 2 * width <= _WIDEST_UNIT_BYTES and offsets.numel() % 2 == 0:
        left, right = offsets[::2], offsets[1::2]
        if bool((left % 2).any()) or not torch.equal(left + 1, right):
            break
        offsets, width = left // 2, 2 * width
    return Gather(np.ascontiguousarray(offsets.numpy(), dtype=np.intp), width)


def _probe(geometry: PageGeometry, *, num_blocks: int) -> torch.Tensor:
    """For every place of a small page tensor, the index of the number that the op puts there."""
    heads, block_size, fused = geometry.page_shape
    tokens = num_blocks * block_size
    index = torch.arange(tokens * heads * fused).view(2, tokens, heads, fused // 2)
    slots = torch.arange(tokens)
    found = torch.zeros(index.numel(), dtype=torch.int64)
    weight = 1
    while weight < index.numel():
        key, value = ((index // weight) % _DIGIT_BASE).to(geometry.dtype).unbind()
        page = torch.full((num_blocks, *geometry.page_shape), float("nan"), dtype=geometry.dtype)
        try:
            pack(page, key, value, slots, geometry.packing)
        except RuntimeError as error:
            raise UnsupportedLayout(f"vLLM's packing op refuses {geometry} ({error})") from error
        if not bool(torch.isfinite(page).all()):
            raise UnsupportedLayout(f"{geometry.packing.value!r} packing leaves places unwritten")
        found += page.flatten().to(torch.int64) * weight
        weight *= _DIGIT_BASE
    return found


def _load_op() -> None:
    if hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
        return
    try:
        import vllm._custom_ops  # noqa: F401
    except ImportError as error:
        raise UnsupportedLayout(f"vLLM's CPU packing op is not installed ({error})") from error
    if not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
        raise UnsupportedLayout("this vLLM has no CPU packing op")
