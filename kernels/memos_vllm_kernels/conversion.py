"""Between the numbers of pages and the rows of an artifact, on the way in and out.

Numbers that change are float32 in between and are rounded once, to nearest even. On a CPU this runs
in pieces that stay in a core's L2 cache, through numba where it is installed (vLLM brings it), and
else through the plain torch of `encoding` and `rotary`, which is the truth for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch

from memos_vllm_kernels import rotary
from memos_vllm_kernels.encoding import FP8, Encoding, decode_numbers, encode
from memos_vllm_kernels.rotary import Angles

# Scratch of float32 and of the page dtype, and the rows themselves, in 1 or 2 MiB of L2.
_PIECE_NUMBERS = 1 << 16


def pieces(num_tokens: int, numbers_per_token: int) -> Iterator[slice]:
    """Ranges of tokens small enough to stay in a core's cache."""
    step = max(1, _PIECE_NUMBERS // max(numbers_per_token, 1))
    for first in range(0, num_tokens, step):
        yield slice(first, min(first + step, num_tokens))


def from_rows(
    rows: torch.Tensor,
    encoding: Encoding,
    *,
    out: torch.Tensor,
    angles: Angles | None = None,
) -> None:
    """Decode and turn. Checks nothing.

    Args:
        rows: [tokens, kv_heads, row_bytes] uint8, or of exact rows the numbers themselves.
        out: [tokens, kv_heads, head_dim] in the dtype of the pages' numbers, mutated.
        angles: by which keys are turned.
    """
    heads, head_dim = out.shape[1:]
    limit = _largest(out.dtype)
    for piece in pieces(len(out), heads * head_dim):
        if encoding is Encoding.EXACT:
            numbers = rows[piece].to(
                torch.float32, copy=True, memory_format=torch.contiguous_format
            )
        else:
            numbers = _decode(rows[piece], encoding, head_dim)
        if angles is not None:
            _turn(numbers, angles.of_tokens(piece))
        if limit is not None:
            # vLLM's own fp8 caches saturate; a plain conversion makes no number of what overflows.
            numbers.clamp_(-limit, limit)
        out[piece] = numbers.to(out.dtype)


def to_rows(numbers: torch.Tensor, encoding: Encoding, *, out: torch.Tensor) -> None:
    """Encode. Checks nothing.

    Args:
        numbers: [tokens, kv_heads, head_dim], any float dtype and strides.
        encoding: any but EXACT.
        out: [tokens, kv_heads, row_bytes] uint8, mutated.
    """
    for piece in pieces(len(numbers), numbers.shape[1] * numbers.shape[2]):
        out[piece] = _encode(numbers[piece], encoding)


def _decode(rows: torch.Tensor, encoding: Encoding, head_dim: int) -> torch.Tensor:
    fast = _fast(rows)
    if fast is None:
        return decode_numbers(rows, encoding, head_dim=head_dim)
    numbers = torch.empty((*rows.shape[:2], head_dim), dtype=torch.float32)
    flat = rows.contiguous().view(-1, rows.shape[-1]).numpy()
    target = numbers.view(-1, head_dim).numpy()
    if encoding is Encoding.INT8:
        fast.decode_int8(flat, target)
    elif encoding is Encoding.INT4:
        fast.decode_int4(flat, target)
    else:
        fast.decode_fp8(flat, _FP8_VALUES.numpy(), target)
    return numbers


def _encode(numbers: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    fast = _fast(numbers)
    if fast is None:
        return encode(numbers, encoding)
    tokens, heads, head_dim = numbers.shape
    width = encoding.row_bytes(head_dim, dtype=numbers.dtype)
    rows = torch.empty((tokens, heads, width), dtype=torch.uint8)
    flat = numbers.to(torch.float32).contiguous().view(-1, head_dim).numpy()
    getattr(fast, f"encode_{encoding.value}")(flat, rows.view(-1, width).numpy())
    return rows


def _turn(numbers: torch.Tensor, angles: Angles) -> None:
    fast = _fast(numbers)
    if fast is None:
        rotary.turn(numbers, angles)
        return
    table = angles.table
    cosines, sines = angles.cosines.numpy(), angles.sines.numpy()
    fast.turn(numbers.numpy(), cosines, sines, table.first_dim, table.interleaved)


def _fast(tensor: torch.Tensor) -> ModuleType | None:
    """The compiled arithmetic, where it is installed and can be used."""
    if tensor.device.type != "cpu" or tensor.requires_grad:
        return None
    try:
        from memos_vllm_kernels import cpu_arithmetic
    except ImportError:
        return None
    return cpu_arithmetic


def _largest(dtype: torch.dtype) -> float | None:
    return torch.finfo(dtype).max if dtype.itemsize == 1 else None


# What each byte means, for want of an fp8 type in numpy.
_FP8_VALUES = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8).to(torch.float32)
