"""Smaller artifacts: KV as integers or fp8 with scales, a row of bytes for each token and head.

    exact  the page's own bytes
    int8   dim signed bytes, then one bfloat16 scale
    fp8    dim bytes of e4m3, then one bfloat16 scale
    int4   dim nibbles (low one first), then a bfloat16 scale and minimum for each 32 dims

The scale is rounded to bfloat16 before it is used, so that decoding multiplies by the very number
that encoding divided by. This module is the plain torch truth; `conversion` and `triton_pages` are
the same arithmetic, faster.
"""

from __future__ import annotations

from enum import Enum

import torch

from memos_vllm_kernels.errors import KernelInputError

INT4_GROUP = 32
_SCALE = torch.bfloat16
_SCALE_BYTES = 2
INT8_LIMIT = 127.0
INT4_LIMIT = 15.0
FP8 = torch.float8_e4m3fn
FP8_LIMIT = torch.finfo(FP8).max


class Encoding(Enum):
    """How the numbers of an artifact are written."""

    EXACT = "exact"
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"

    def row_bytes(self, head_dim: int, *, dtype: torch.dtype) -> int:
        """Bytes of one token's keys (or values) in one head.

        Args:
            dtype: of the pages; only exact rows depend on it.
        """
        if self is Encoding.EXACT:
            return head_dim * dtype.itemsize
        if self is Encoding.INT4:
            return self.data_bytes(head_dim) + num_groups(head_dim) * 2 * _SCALE_BYTES
        return self.data_bytes(head_dim) + _SCALE_BYTES

    def data_bytes(self, head_dim: int) -> int:
        """Bytes of a row before its scales; of encoded rows only."""
        return -(-head_dim // 2) if self is Encoding.INT4 else head_dim


def encode(tokens: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """Write keys or values as rows of bytes.

    Args:
        tokens: [tokens, kv_heads, head_dim], any float dtype and strides. What is not finite makes
            its scale not finite, and is not finite when it is decoded.
    Returns:
        [tokens, kv_heads, row_bytes] uint8, contiguous.
    Raises:
        KernelInputError: not floats in three dimensions.
    """
    if tokens.dim() != 3 or not tokens.is_floating_point():
        raise KernelInputError(
            f"tokens are {tokens.dtype} {tuple(tokens.shape)}, expected floats [tokens, heads, dim]"
        )
    if encoding is Encoding.EXACT:
        return tokens.contiguous().view(torch.uint8)
    numbers = tokens.to(torch.float32).contiguous()
    if encoding is Encoding.INT4:
        return _encode_int4(numbers)
    limit = INT8_LIMIT if encoding is Encoding.INT8 else FP8_LIMIT
    scale = (numbers.abs().amax(-1, keepdim=True) / limit).to(_SCALE)
    scaled = _divide(numbers, scale).clamp(-limit, limit)
    if encoding is Encoding.INT8:
        data = scaled.round().nan_to_num().to(torch.int8).view(torch.uint8)
    else:
        data = scaled.to(FP8).view(torch.uint8)
    return torch.cat((data, _bytes(scale)), dim=-1)


def decode(
    rows: torch.Tensor, encoding: Encoding, *, head_dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """Read rows of bytes back as keys or values.

    Args:
        rows: [tokens, kv_heads, row_bytes] uint8, as `encode` writes them.
        dtype: of the result; computed in float32 and rounded once, to nearest even.
    Returns:
        [tokens, kv_heads, head_dim], contiguous; of exact rows a view.
    Raises:
        KernelInputError: rows of another width or dtype.
    """
    width = encoding.row_bytes(head_dim, dtype=dtype)
    if rows.dim() != 3 or rows.dtype != torch.uint8 or rows.shape[-1] != width:
        raise KernelInputError(
            f"rows are {rows.dtype} {tuple(rows.shape)}, expected bytes [tokens, heads, {width}]"
        )
    if encoding is Encoding.EXACT:
        return rows.contiguous().view(dtype)
    return decode_numbers(rows, encoding, head_dim=head_dim).to(dtype)


def decode_numbers(rows: torch.Tensor, encoding: Encoding, *, head_dim: int) -> torch.Tensor:
    """Encoded rows as float32 [tokens, kv_heads, head_dim], not rounded yet. Checks nothing."""
    if encoding is Encoding.INT4:
        return _decode_int4(rows, head_dim)
    data = rows[..., :head_dim].contiguous()
    numbers = data.view(torch.int8 if encoding is Encoding.INT8 else FP8).to(torch.float32)
    return numbers * _scales(rows[..., head_dim:])


def _encode_int4(numbers: torch.Tensor) -> torch.Tensor:
    head_dim = numbers.shape[-1]
    groups = num_groups(head_dim)
    # The last group is filled up with its own last number, which moves no minimum or maximum.
    padding = groups * INT4_GROUP - head_dim
    if padding:
        last = numbers[..., -1:].expand(*numbers.shape[:-1], padding)
        numbers = torch.cat((numbers, last), dim=-1)
    grouped = numbers.view(*numbers.shape[:-1], groups, INT4_GROUP)
    low, high = (bound.unsqueeze(-1) for bound in grouped.aminmax(dim=-1))
    minimum = low.to(_SCALE)
    scale = ((high - minimum.to(torch.float32)) / INT4_LIMIT).to(_SCALE)
    steps = _divide(grouped - minimum.to(torch.float32), scale)
    levels = steps.clamp(0.0, INT4_LIMIT).round().nan_to_num().to(torch.uint8)
    flat = torch.nn.functional.pad(levels.flatten(-2)[..., :head_dim], (0, head_dim % 2))
    data = flat[..., 0::2] | flat[..., 1::2] << 4
    parameters = torch.cat((scale, minimum), dim=-1).flatten(-2)
    return torch.cat((data, _bytes(parameters)), dim=-1)


def _decode_int4(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    groups, data_bytes = num_groups(head_dim), -(-head_dim // 2)
    data = rows[..., :data_bytes]
    levels = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2).to(torch.float32)
    parameters = _scales(rows[..., data_bytes:]).repeat_interleave(INT4_GROUP, dim=-1)
    by_group = parameters.view(*rows.shape[:-1], groups, 2, INT4_GROUP)
    scale = by_group[..., 0, :].flatten(-2)[..., :head_dim]
    minimum = by_group[..., 1, :].flatten(-2)[..., :head_dim]
    return levels[..., :head_dim] * scale + minimum


def _divide(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """By a scale of 0, where all numbers are equal, to 0."""
    divisor = scale.to(torch.float32)
    return torch.where(divisor == 0, torch.zeros_like(numbers), numbers / divisor)


def num_groups(head_dim: int) -> int:
    """Into how many groups INT4 cuts a head; the last one may be short."""
    return -(-head_dim // INT4_GROUP)


def _bytes(scales: torch.Tensor) -> torch.Tensor:
    return scales.contiguous().view(torch.uint8)


def _scales(raw: torch.Tensor) -> torch.Tensor:
    # A copy: of one row alone, they may lie at an odd address.
    return raw.clone(memory_format=torch.contiguous_format).view(_SCALE).to(torch.float32)
