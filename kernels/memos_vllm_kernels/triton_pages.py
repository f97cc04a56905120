"""Triton kernels: every layer's tokens between GPU pages and the canonical layout, in one launch.

Pages are addressed as `PageGeometry.halves_of` views them, [halves, num_blocks, kv_heads,
block_size, head_dim] by its strides, so that every order and arrangement that a backend declares is
the same kernel. Layers lie anywhere: the kernel finds them in a table of base addresses.

Numbers that are only moved move as integers of their width, so that NaN payloads, -0.0 and
denormals stay as they are. `plain_pages` is the truth beside which these kernels are tested,
interpreted on a CPU (TRITON_INTERPRET=1).
"""

# Triton compiles these bodies, where a branch that returns needs its else.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from memos_vllm_kernels.encoding import Encoding
from memos_vllm_kernels.errors import KernelInputError
from memos_vllm_kernels.layout import INTEGER_OF_WIDTH, PageGeometry
from memos_vllm_kernels.rotary import Angles
from memos_vllm_kernels.triton_arithmetic import from_bits, load_numbers, store_rows, to_bits

# What one program moves of one half, head and layer: 64 tokens of 64 bfloat16 numbers are 8 KiB.
# Half as many where each number is also computed, so that registers suffice. Not yet measured on a
# GPU.
_NUMBERS_PER_PROGRAM = 4096

_NUMBERS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
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
    """Where each token's row of this program's head and layer begins, [token_lanes, 1]."""
    base = tokens + tl.program_id(2).to(tl.int64) * stride_layer
    base += tl.program_id(1).to(tl.int64) * stride_head
    return base + token.to(tl.int64)[:, None] * stride_token


@triton.jit
def _import_dims(
    page,
    source,
    is_token,
    first: tl.constexpr,
    end: tl.constexpr,
    head_dim: tl.constexpr,
    dim_lanes: tl.constexpr,
    encoding: tl.constexpr,
    number: tl.constexpr,
    element: tl.constexpr,
):
    """Write dims [first, end) of every token as they are."""
    dim = tl.arange(0, dim_lanes)[None, :]
    inside = is_token[:, None] & (dim >= first) & (dim < end)
    if encoding == "exact":
        tl.store(page + dim, tl.load(source + dim, mask=inside, other=0), mask=inside)
    else:
        value = load_numbers(source, dim, inside, head_dim, encoding, number)
        tl.store(page + dim, to_bits(value, number, element), mask=inside)


@triton.jit
def import_kernel(
    layer_table,
    tokens,
    slot_mapping,
    num_tokens,
    block_size,
    stride_half,
    stride_block,
    stride_head,
    stride_slot,
    tokens_stride_layer,
    tokens_stride_half,
    tokens_stride_token,
    tokens_stride_head,
    cosines,
    sines,
    halves: tl.constexpr,
    head_dim: tl.constexpr,
    dim_lanes: tl.constexpr,
    first_pair: tl.constexpr,
    half_rotary: tl.constexpr,
    pair_lanes: tl.constexpr,
    interleaved: tl.constexpr,
    encoding: tl.constexpr,
    element: tl.constexpr,
    number: tl.constexpr,
    aligned: tl.constexpr,
    token_lanes: tl.constexpr,
):
    """Grid: [token tiles, kv_heads, layers]. `half_rotary` 0 turns no key; `first_pair` is the dim
    where those that are turned begin."""
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

    if halves == 2:
        _import_dims(
            page + stride_half,
            source + tokens_stride_half,
            is_token,
            0,
            head_dim,
            head_dim,
            dim_lanes,
            encoding,
            number,
            element,
        )
    end_pair: tl.constexpr = first_pair + 2 * half_rotary
    if first_pair > 0:
        _import_dims(
            page, source, is_token, 0, first_pair, head_dim, dim_lanes, encoding, number, element
        )
    if end_pair < head_dim:
        _import_dims(
            page,
            source,
            is_token,
            end_pair,
            head_dim,
            head_dim,
            dim_lanes,
            encoding,
            number,
            element,
        )
    if half_rotary > 0:
        pair = tl.arange(0, pair_lanes)[None, :]
        is_pair = is_token[:, None] & (pair < half_rotary)
        place = token[:, None] * half_rotary + pair
        cos = tl.load(cosines + place, mask=is_pair, other=0.0)
        sin = tl.load(sines + place, mask=is_pair, other=0.0)
        if interleaved:
            # Read and written as they lie, and taken apart in registers.
            lane = tl.arange(0, 2 * pair_lanes)[None, :]
            both = first_pair + lane
            is_both = is_token[:, None] & (lane < 2 * half_rotary)
            numbers = load_numbers(source, both, is_both, head_dim, encoding, number)
            left, right = tl.split(tl.reshape(numbers, [token_lanes, pair_lanes, 2]))
            turned = tl.join(left * cos - right * sin, right * cos + left * sin)
            turned = tl.reshape(turned, [token_lanes, 2 * pair_lanes])
            tl.store(page + both, to_bits(turned, number, element), mask=is_both)
        else:
            near = first_pair + pair
            far = near + half_rotary
            left = load_numbers(source, near, is_pair, head_dim, encoding, number)
            right = load_numbers(source, far, is_pair, head_dim, encoding, number)
            turned_left = to_bits(left * cos - right * sin, number, element)
            turned_right = to_bits(right * cos + left * sin, number, element)
            tl.store(page + near, turned_left, mask=is_pair)
            tl.store(page + far, turned_right, mask=is_pair)


@triton.jit
def export_kernel(
    layer_table,
    tokens,
    block_ids,
    token_start,
    num_tokens,
    block_size,
    stride_half,
    stride_block,
    stride_head,
    stride_slot,
    tokens_stride_layer,
    tokens_stride_half,
    tokens_stride_token,
    tokens_stride_head,
    halves: tl.constexpr,
    head_dim: tl.constexpr,
    dim_lanes: tl.constexpr,
    encoding: tl.constexpr,
    element: tl.constexpr,
    number: tl.constexpr,
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
    for half in tl.static_range(halves):
        bits = tl.load(page + half * stride_half + dim, mask=inside, other=0)
        row = target + half * tokens_stride_half
        if encoding == "exact":
            tl.store(row + dim, bits, mask=inside)
        else:
            value = from_bits(bits, number)
            store_rows(row, value, is_token, head_dim, dim_lanes, token_lanes, encoding)


@dataclass(frozen=True, slots=True)
class LayerTable:
    """Where layers lie; made once, because sending addresses to a GPU waits for it.

    Attributes:
        addresses: [layers] int64 on the pages' device.
        page: of one of the layers, for its strides, which are those of all.
        aligned: every layer begins at a multiple of 16 bytes; strides speak for themselves.
    """

    addresses: torch.Tensor
    page: torch.Tensor
    aligned: bool

    @classmethod
    def of(cls, pages: Sequence[torch.Tensor]) -> LayerTable:
        places = [page.data_ptr() for page in pages]
        addresses = torch.tensor(places, device=pages[0].device)
        return cls(addresses, pages[0], all(place % 16 == 0 for place in places))

    def only(self, layer: int, page: torch.Tensor) -> LayerTable:
        """One layer's row; `page` is its own."""
        return LayerTable(self.addresses[layer : layer + 1], page, page.data_ptr() % 16 == 0)


def import_layers(
    layers: LayerTable,
    geometry: PageGeometry,
    kv: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    numbers: torch.dtype,
    encoding: Encoding = Encoding.EXACT,
    angles: Angles | None = None,
) -> None:
    """Write canonical KV into every layer's slots. Checks only what Triton asks for: see `pages`.

    Args:
        layers: their pages are mutated.
        kv: [layers, halves, tokens, kv_heads, head_dim or row_bytes], last dim contiguous.
        slot_mapping: [tokens] int64, contiguous.
        numbers: what the pages' bytes mean.
        angles: by which the keys are turned.
    Raises:
        KernelInputError: rows of scales at odd addresses.
    """
    num_layers, halves, num_tokens, heads, _ = kv.shape
    _check_rows(kv, geometry, encoding)
    half_rotary = first_pair = 0
    # Without a rotation the kernel reads neither.
    cosines = sines = slot_mapping
    if angles is not None:
        half_rotary, first_pair = angles.table.rotary_dim // 2, angles.table.first_dim
        cosines, sines = angles.cosines, angles.sines
    tokens = _as_elements(kv, geometry, encoding)
    dim_lanes = dim_lanes_for(geometry.head_dim)
    token_lanes = token_lanes_for(geometry.head_dim, encoding)
    import_kernel[(triton.cdiv(num_tokens, token_lanes), heads, num_layers)](
        layers.addresses,
        tokens,
        slot_mapping,
        num_tokens,
        geometry.block_size,
        *geometry.halves_of(layers.page).stride()[:4],
        *tokens.stride()[:4],
        cosines,
        sines,
        halves=halves,
        head_dim=geometry.head_dim,
        dim_lanes=dim_lanes,
        first_pair=first_pair,
        half_rotary=half_rotary,
        pair_lanes=triton.next_power_of_2(max(half_rotary, 1)),
        interleaved=angles is not None and angles.table.interleaved,
        encoding=encoding.value,
        element=_element(geometry.dtype),
        number=_NUMBERS.get(numbers, tl.float32),
        aligned=layers.aligned,
        token_lanes=token_lanes,
    )


def export_layers(
    layers: LayerTable,
    geometry: PageGeometry,
    block_ids: torch.Tensor,
    *,
    token_start: int,
    out: torch.Tensor,
    numbers: torch.dtype,
    encoding: Encoding = Encoding.EXACT,
) -> None:
    """Read every layer's tokens into the canonical layout, see `import_layers`.

    Args:
        block_ids: [n] int64, contiguous; order is token order.
        token_start: first token, counted from the first slot of `block_ids[0]`.
        out: [layers, halves, tokens, kv_heads, head_dim or row_bytes], mutated.
    Raises:
        KernelInputError: rows of scales at odd addresses.
    """
    num_layers, halves, num_tokens, heads, _ = out.shape
    _check_rows(out, geometry, encoding)
    tokens = _as_elements(out, geometry, encoding)
    dim_lanes = dim_lanes_for(geometry.head_dim)
    token_lanes = token_lanes_for(geometry.head_dim, encoding)
    export_kernel[(triton.cdiv(num_tokens, token_lanes), heads, num_layers)](
        layers.addresses,
        tokens,
        block_ids,
        token_start,
        num_tokens,
        geometry.block_size,
        *geometry.halves_of(layers.page).stride()[:4],
        *tokens.stride()[:4],
        halves=halves,
        head_dim=geometry.head_dim,
        dim_lanes=dim_lanes,
        encoding=encoding.value,
        element=_element(geometry.dtype),
        number=_NUMBERS.get(numbers, tl.float32),
        aligned=layers.aligned,
        token_lanes=token_lanes,
    )


def _as_elements(kv: torch.Tensor, geometry: PageGeometry, encoding: Encoding) -> torch.Tensor:
    """Numbers as integers of their width; rows of bytes as they are."""
    if encoding is not Encoding.EXACT:
        return kv
    return kv.view(INTEGER_OF_WIDTH[geometry.dtype.itemsize])


def _check_rows(kv: torch.Tensor, geometry: PageGeometry, encoding: Encoding) -> None:
    """Scales are read as 16-bit numbers, so each must lie at an even address."""
    if encoding is Encoding.EXACT:
        return
    places = (kv.data_ptr(), *kv.stride()[:4], encoding.data_bytes(geometry.head_dim))
    if any(place % 2 for place in places) or geometry.head_dim % 2:
        raise KernelInputError(
            f"{encoding.value} rows need even addresses and an even head_dim, got strides "
            f"{kv.stride()} and head_dim {geometry.head_dim}"
        )


def dim_lanes_for(head_dim: int) -> int:
    """A power of two, and at least one group of int4."""
    return max(32, int(triton.next_power_of_2(head_dim)))


def token_lanes_for(head_dim: int, encoding: Encoding) -> int:
    """How many tokens one program moves: a power of two."""
    numbers = _NUMBERS_PER_PROGRAM if encoding is Encoding.EXACT else _NUMBERS_PER_PROGRAM // 2
    return max(1, numbers // dim_lanes_for(head_dim))


def _element(dtype: torch.dtype) -> tl.dtype:
    return {1: tl.int8, 2: tl.int16, 4: tl.int32}[dtype.itemsize]
