"""Triton kernels: every layer's tokens between GPU pages and the canonical layout, in one launch.

Pages are addressed as vLLM's logical view of a layer, [num_blocks, kv_heads, block_size, content],
by its strides, so that every physical order that a backend declares is the same kernel. Layers lie
anywhere: the kernel finds them in a table of base addresses.

Numbers move as integers of their width, so that NaN payloads, -0.0 and denormals stay as they are;
only keys that are turned on the way become float32 in between. `plain_pages` and `rotary` are the
truth beside which these kernels are tested, interpreted on a CPU (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from memos_vllm_kernels.layout import INTEGER_OF_WIDTH, PageGeometry
from memos_vllm_kernels.rotary import Rotation, rotation_tables

# One program moves this many tokens of one head of one layer: 32 tokens of 64 bfloat16 numbers are
# 4 KiB for keys and as much for values. Not yet measured on a GPU.
_TOKENS_PER_PROGRAM = 32

_FLOATS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def _page_rows(
    layer_table,
    block,
    offset,
    stride_block,
    stride_head,
    stride_slot,
    element: tl.constexpr,
    aligned: tl.constexpr,
):
    """Where each slot's row of this program's head and layer begins, [token_lanes, 1].

    `block` and `offset` are 64-bit, since pools exceed 2^31 numbers.
    """
    base = tl.load(layer_table + tl.program_id(2)).to(tl.pointer_type(element))
    if aligned:
        # The compiler cannot know it of an address that it loads, and would move single numbers.
        base = tl.multiple_of(base, 16)
    base += tl.program_id(1).to(tl.int64) * stride_head
    return base + (block * stride_block + offset * stride_slot)[:, None]


@triton.jit
def _token_rows(tokens, token, stride_layer, stride_token, stride_head):
    """Where each token's keys of this program's head and layer begin, [token_lanes, 1]."""
    base = tokens + tl.program_id(2).to(tl.int64) * stride_layer
    base += tl.program_id(1).to(tl.int64) * stride_head
    return base + token.to(tl.int64)[:, None] * stride_token


@triton.jit
def import_kernel(
    layer_table,
    tokens,
    slot_mapping,
    num_tokens,
    block_size,
    stride_block,
    stride_head,
    stride_slot,
    tokens_stride_layer,
    tokens_stride_half,
    tokens_stride_token,
    tokens_stride_head,
    cosines,
    sines,
    head_dim: tl.constexpr,
    dim_lanes: tl.constexpr,
    half_rotary: tl.constexpr,
    pair_lanes: tl.constexpr,
    interleaved: tl.constexpr,
    element: tl.constexpr,
    number: tl.constexpr,
    aligned: tl.constexpr,
    token_lanes: tl.constexpr,
):
    """Grid: [token tiles, kv_heads, layers]. `half_rotary` 0 copies keys as they are."""
    token = tl.program_id(0) * token_lanes + tl.arange(0, token_lanes)
    is_token = token < num_tokens
    slot = tl.load(slot_mapping + token, mask=is_token, other=0).to(tl.int64)
    block, offset = slot // block_size, slot % block_size
    page = _page_rows(
        layer_table, block, offset, stride_block, stride_head, stride_slot, element, aligned
    )
    source = _token_rows(
        tokens, token, tokens_stride_layer, tokens_stride_token, tokens_stride_head
    )

    dim = tl.arange(0, dim_lanes)[None, :]
    inside = is_token[:, None] & (dim < head_dim)
    values = tl.load(source + tokens_stride_half + dim, mask=inside, other=0)
    tl.store(page + head_dim + dim, values, mask=inside)
    if 2 * half_rotary < head_dim:
        # Keys that are not turned: all of them, or what lies behind the rotary dims.
        unturned = inside & (dim >= 2 * half_rotary)
        tl.store(page + dim, tl.load(source + dim, mask=unturned, other=0), mask=unturned)
    if half_rotary > 0:
        pair = tl.arange(0, pair_lanes)[None, :]
        is_pair = is_token[:, None] & (pair < half_rotary)
        place = token[:, None] * half_rotary + pair
        cos = tl.load(cosines + place, mask=is_pair, other=0.0)
        sin = tl.load(sines + place, mask=is_pair, other=0.0)
        if interleaved:
            # Read and written as they lie, and taken apart in registers.
            both = tl.arange(0, 2 * pair_lanes)[None, :]
            is_both = is_token[:, None] & (both < 2 * half_rotary)
            numbers = tl.load(source + both, mask=is_both, other=0)
            numbers = numbers.to(number, bitcast=True).to(tl.float32)
            left, right = tl.split(tl.reshape(numbers, [token_lanes, pair_lanes, 2]))
            turned = tl.join(left * cos - right * sin, right * cos + left * sin)
            turned = tl.reshape(turned, [token_lanes, 2 * pair_lanes])
            turned = turned.to(number).to(element, bitcast=True)
            tl.store(page + both, turned, mask=is_both)
        else:
            left = tl.load(source + pair, mask=is_pair, other=0)
            right = tl.load(source + half_rotary + pair, mask=is_pair, other=0)
            left = left.to(number, bitcast=True).to(tl.float32)
            right = right.to(number, bitcast=True).to(tl.float32)
            turned_left = (left * cos - right * sin).to(number).to(element, bitcast=True)
            turned_right = (right * cos + left * sin).to(number).to(element, bitcast=True)
            tl.store(page + pair, turned_left, mask=is_pair)
            tl.store(page + half_rotary + pair, turned_right, mask=is_pair)


@triton.jit
def export_kernel(
    layer_table,
    tokens,
    block_ids,
    token_start,
    num_tokens,
    block_size,
    stride_block,
    stride_head,
    stride_slot,
    tokens_stride_layer,
    tokens_stride_half,
    tokens_stride_token,
    tokens_stride_head,
    head_dim: tl.constexpr,
    dim_lanes: tl.constexpr,
    element: tl.constexpr,
    aligned: tl.constexpr,
    token_lanes: tl.constexpr,
):
    """Grid: [token tiles, kv_heads, layers]."""
    token = tl.program_id(0) * token_lanes + tl.arange(0, token_lanes)
    is_token = token < num_tokens
    place = token + token_start
    block = tl.load(block_ids + place // block_size, mask=is_token, other=0).to(tl.int64)
    offset = (place % block_size).to(tl.int64)
    page = _page_rows(
        layer_table, block, offset, stride_block, stride_head, stride_slot, element, aligned
    )
    target = _token_rows(
        tokens, token, tokens_stride_layer, tokens_stride_token, tokens_stride_head
    )

    dim = tl.arange(0, dim_lanes)[None, :]
    inside = is_token[:, None] & (dim < head_dim)
    tl.store(target + dim, tl.load(page + dim, mask=inside, other=0), mask=inside)
    values = tl.load(page + head_dim + dim, mask=inside, other=0)
    tl.store(target + tokens_stride_half + dim, values, mask=inside)


def import_layers(
    pages: Sequence[torch.Tensor],
    geometry: PageGeometry,
    kv: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    rotation: Rotation | None = None,
) -> None:
    """Write canonical KV into every layer's slots. Checks nothing: see `pages`.

    Args:
        pages: [num_blocks, kv_heads, block_size, 2 * head_dim] each, mutated; strides all alike.
        kv: [layers, 2, tokens, kv_heads, head_dim], last dim contiguous.
        slot_mapping: [tokens] int64, contiguous.
        rotation: turn the keys on their way in.
    """
    num_layers, _, num_tokens, heads, head_dim = kv.shape
    if num_tokens == 0:
        return
    dtype = geometry.dtype
    half_rotary = 0
    # Without a rotation the kernel reads neither.
    cosines = sines = slot_mapping
    if rotation is not None:
        half_rotary = rotation.table.rotary_dim // 2
        cosines, sines = rotation_tables(rotation.deltas, rotation.table)
    integers = kv.view(INTEGER_OF_WIDTH[dtype.itemsize])
    first = pages[0]
    import_kernel[_grid(num_tokens, heads, num_layers)](
        _layer_table(pages),
        integers,
        slot_mapping,
        num_tokens,
        geometry.block_size,
        first.stride(0),
        first.stride(1),
        first.stride(2),
        *integers.stride()[:4],
        cosines,
        sines,
        head_dim=head_dim,
        dim_lanes=triton.next_power_of_2(head_dim),
        half_rotary=half_rotary,
        pair_lanes=triton.next_power_of_2(max(half_rotary, 1)),
        interleaved=rotation is not None and rotation.table.interleaved,
        element=_element(dtype),
        number=_FLOATS.get(dtype, tl.float32),
        aligned=_are_aligned(pages),
        token_lanes=_TOKENS_PER_PROGRAM,
    )


def export_layers(
    pages: Sequence[torch.Tensor],
    geometry: PageGeometry,
    block_ids: torch.Tensor,
    *,
    token_start: int,
    out: torch.Tensor,
) -> None:
    """Read every layer's tokens into the canonical layout. Checks nothing: see `pages`.

    Args:
        pages: as `import_layers`.
        block_ids: [n] int64, contiguous; order is token order.
        token_start: first token, counted from the first slot of `block_ids[0]`.
        out: [layers, 2, tokens, kv_heads, head_dim], last dim contiguous, mutated.
    """
    num_layers, _, num_tokens, heads, head_dim = out.shape
    if num_tokens == 0:
        return
    integers = out.view(INTEGER_OF_WIDTH[geometry.dtype.itemsize])
    first = pages[0]
    export_kernel[_grid(num_tokens, heads, num_layers)](
        _layer_table(pages),
        integers,
        block_ids,
        token_start,
        num_tokens,
        geometry.block_size,
        first.stride(0),
        first.stride(1),
        first.stride(2),
        *integers.stride()[:4],
        head_dim=head_dim,
        dim_lanes=triton.next_power_of_2(head_dim),
        element=_element(geometry.dtype),
        aligned=_are_aligned(pages),
        token_lanes=_TOKENS_PER_PROGRAM,
    )


def _grid(num_tokens: int, heads: int, num_layers: int) -> tuple[int, int, int]:
    return (triton.cdiv(num_tokens, _TOKENS_PER_PROGRAM), heads, num_layers)


def _layer_table(pages: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where each layer begins, [layers] int64 on the pages' device."""
    return torch.tensor([page.data_ptr() for page in pages], device=pages[0].device)


def _are_aligned(pages: Sequence[torch.Tensor]) -> bool:
    """Whether every layer begins at a multiple of 16 bytes; strides speak for themselves."""
    return all(page.data_ptr() % 16 == 0 for page in pages)


def _element(dtype: torch.dtype) -> tl.dtype:
    return {1: tl.int8, 2: tl.int16, 4: tl.int32}[dtype.itemsize]
