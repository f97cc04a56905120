"""Between the numbers of pages and the rows of an artifact, on the way in and out.

Numbers that change are float32 in between and are rounded once, to nearest even. On a CPU this runs
through numba where it is installed (vLLM brings it), and else through the plain torch of `encoding`
and `rotary`, which is the truth for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch

from memos_vllm_kernels import rotary
from memos_vllm_kernels.encoding import FP8, Encoding, decode_numbers, encode
from memos_vllm_kernels.layout import INTEGER_OF_WIDTH
from memos_vllm_kernels.rotary import Angles
from memos_vllm_kernels.scratch import scratch

# A few MiB of scratch. Smaller pieces stay in a faster cache, but each one costs calls: a layer of
# 600,000 numbers in one piece was faster than in nine.
_PIECE_NUMBERS = 1 << 20


def pieces(num_tokens: int, numbers_per_token: int) -> Iterator[slice]:
    """Ranges of tokens that bound the scratch of one call."""
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
        rows: [tokens, kv_heads, row_bytes] uint8, or of exact rows the numbers themselves, in the
            dtype of `out`.
        out: [tokens, kv_heads, head_dim] in the dtype of the pages' numbers, mutated.
        angles: by which keys are turned.
    """
    if encoding is Encoding.EXACT and angles is None:
        integer = INTEGER_OF_WIDTH[out.element_size()]
        out.view(integer).copy_(rows.view(integer))
        return
    fast = _fast(out)
    for piece in pieces(len(out), out.shape[1] * out.shape[2]):
        turned = None if angles is None else angles.of_tokens(piece)
        if fast is None:
            out[piece] = _rounded(_numbers(rows[piece], encoding, out.shape[2], turned), out.dtype)
        else:
            _from_rows_fast(fast, rows[piece], encoding, turned, out[piece])


def to_rows(numbers: torch.Tensor, encoding: Encoding, *, out: torch.Tensor) -> None:
    """Encode. Checks nothing.

    Args:
        numbers: [tokens, kv_heads, head_dim], any float dtype and strides.
        encoding: any but EXACT.
        out: [tokens, kv_heads, row_bytes] uint8, mutated.
    """
    fast = _fast(numbers)
    for piece in pieces(len(numbers), numbers.shape[1] * numbers.shape[2]):
        if fast is None:
            out[piece] = encode(numbers[piece], encoding)
        else:
            _to_rows_fast(fast, numbers[piece], encoding, out[piece])


def warm_up(encoding: Encoding, *, head_dim: int, dtype: torch.dtype) -> None:
    """Compile ahead what the first rows would have to wait for, about a second.

    Args:
        dtype: of the pages' numbers.
    """
    if encoding is Encoding.EXACT:
        return
    numbers = torch.zeros((1, 1, head_dim), dtype=dtype)
    width = encoding.row_bytes(head_dim, dtype=dtype)
    rows = torch.empty((1, 1, width), dtype=torch.uint8)
    to_rows(numbers, encoding, out=rows)
    from_rows(rows, encoding, out=numbers)


def _numbers(
    rows: torch.Tensor, encoding: Encoding, head_dim: int, angles: Angles | None
) -> torch.Tensor:
    if encoding is Encoding.EXACT:
        numbers = rows.to(torch.float32, copy=True)
    else:
        numbers = decode_numbers(rows, encoding, head_dim=head_dim)
    return numbers if angles is None else rotary.turn(numbers, angles)


def _rounded(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype.itemsize == 1:
        # vLLM's own fp8 caches saturate; a plain conversion makes no number of what overflows.
        limit = torch.finfo(dtype).max
        numbers = numbers.clamp(-limit, limit)
    return numbers.to(dtype)


def _from_rows_fast(
    fast: ModuleType,
    rows: torch.Tensor,
    encoding: Encoding,
    angles: Angles | None,
    out: torch.Tensor,
) -> None:
    """`from_rows` of one piece in one pass, or in two: decoded, then turned."""
    target = out
    if not out.is_contiguous() or out.dtype not in _FAST_DTYPES:
        target = scratch("rounded", tuple(out.shape), torch.float32)
    numbers = rows
    if encoding is not Encoding.EXACT:
        numbers = target
        if angles is not None:
            numbers = scratch("decoded", tuple(out.shape), torch.float32)
        flat, into = _matrix(rows.contiguous()), _matrix(numbers)
        if encoding is Encoding.FP8:
            fast.decode_fp8(flat, _FP8_VALUES.numpy(), into)
        else:
            getattr(fast, f"decode_{encoding.value}")(flat, into)
    elif rows.dtype not in _FAST_DTYPES:
        numbers = rows.to(torch.float32)
    if angles is not None:
        table = angles.table
        fast.turn(
            _array(numbers.contiguous()),
            (angles.cosines.numpy(), angles.sines.numpy()),
            table.first_dim,
            table.interleaved,
            _array(target),
        )
    if target is not out:
        out.copy_(_rounded(target, out.dtype))


def _to_rows_fast(
    fast: ModuleType, numbers: torch.Tensor, encoding: Encoding, out: torch.Tensor
) -> None:
    """`to_rows` of one piece."""
    if numbers.dtype not in _FAST_DTYPES:
        numbers = numbers.to(torch.float32)
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=torch.uint8)
    getattr(fast, f"encode_{encoding.value}")(_matrix(numbers.contiguous()), _matrix(target))
    if target is not out:
        out.copy_(target)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """bfloat16 as the bits that `cpu_arithmetic` takes."""
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: np.ndarray = tensor.numpy()
    return array


def _matrix(tensor: torch.Tensor) -> np.ndarray:
    """One row for each token and head."""
    return _array(tensor.view(-1, tensor.shape[-1]))


def _fast(tensor: torch.Tensor) -> ModuleType | None:
    """The compiled arithmetic, where it is installed and can be used."""
    if tensor.device.type != "cpu":
        return None
    try:
        from memos_vllm_kernels import cpu_arithmetic
    except ImportError:
        return None
    return cpu_arithmetic


_FAST_DTYPES = (torch.bfloat16, torch.float32)
# What each byte means, for want of an fp8 type in numpy.
_FP8_VALUES = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8).to(torch.float32)
