"""What the Triton kernels compute: numbers from bits, rows and angles, and back.

The same arithmetic as `encoding` and `rotary`. bfloat16 and e4m3 are made of integers by hand, so
that they round to nearest even everywhere: Triton's interpreter rounds otherwise, and GPUs before
sm_89 have no e4m3.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding and subtracting it rounds a float32 below 2^22 to nearest even.
_ROUNDER = tl.constexpr(12582912.0)
_INT8_LIMIT = tl.constexpr(127.0)
_INT4_LIMIT = tl.constexpr(15.0)
_FP8_LIMIT = tl.constexpr(448.0)
_E5M2_LIMIT = tl.constexpr(57344.0)
_GROUP = tl.constexpr(32)


@triton.jit
def from_bits(bits, number: tl.constexpr):
    """Numbers of a page as float32, from integers of their width."""
    # Every else is needed: Triton compiles what follows a branch that returns.
    if number == tl.bfloat16:
        # As 32 bits first: shifting 16-bit integers would lose what is shifted.
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif number == tl.float8e4nv:
        # The exponent of a half, 8 too small; its denormals are a half's denormals.
        byte = bits.to(tl.int32) & 255
        half = ((byte & 127) << 7) | ((byte & 128) << 8)
        value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((byte & 127) == 127, float("nan"), value)
    elif number == tl.float8e5:
        # The upper byte of a half.
        half = (bits.to(tl.int32) & 255) << 8
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return bits.to(number, bitcast=True).to(tl.float32)


@triton.jit
def to_bits(value, number: tl.constexpr, element: tl.constexpr):
    """The inverse: rounded to nearest even; fp8 saturates, as vLLM's own caches do."""
    if number == tl.bfloat16:
        return bfloat16_bits(value).to(element)
    elif number == tl.float8e4nv:
        return e4m3_bits(value).to(element)
    elif number == tl.float8e5:
        return e5m2_bits(value).to(element)
    else:
        return value.to(number).to(element, bitcast=True)


@triton.jit
def bfloat16_bits(value):
    """The upper half of a float32, rounded, as int32."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return tl.where(value == value, (rounded >> 16) & 0xFFFF, 0x7FC0)


@triton.jit
def e4m3_bits(value):
    """Sign, 4 bits of exponent (bias 7), 3 of mantissa, as int32; 0x7F is no number."""
    clamped = tl.minimum(tl.maximum(value, -_FP8_LIMIT), _FP8_LIMIT)
    bits = clamped.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    small = (tl.abs(clamped) * 512.0 + _ROUNDER) - _ROUNDER
    # 2^-6, the smallest normal number; what is rounded up to it has the right bits.
    found = tl.where(tl.abs(clamped) < 0.015625, small.to(tl.int32), normal)
    return tl.where(value == value, sign | found, 0x7F)


@triton.jit
def e5m2_bits(value):
    """Sign, 5 bits of exponent (bias 15), 2 of mantissa, as int32; 0x7F is no number."""
    clamped = tl.minimum(tl.maximum(value, -_E5M2_LIMIT), _E5M2_LIMIT)
    bits = clamped.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0xFFFFF + ((magnitude >> 21) & 1)) >> 21) - (112 << 2)
    small = (tl.abs(clamped) * 65536.0 + _ROUNDER) - _ROUNDER
    # 2^-14, the smallest normal number.
    found = tl.where(tl.abs(clamped) < 0.00006103515625, small.to(tl.int32), normal)
    return tl.where(value == value, sign | found, 0x7F)


@triton.jit
def bfloat16_at(row, offset, mask):
    """The bfloat16 at an even offset of a row of bytes, as float32."""
    bits = tl.load((row + offset).to(tl.pointer_type(tl.int16), bitcast=True), mask=mask, other=0)
    return from_bits(bits, tl.bfloat16)


@triton.jit
def load_numbers(
    row,
    dim,
    mask,
    head_dim: tl.constexpr,
    encoding: tl.constexpr,
    number: tl.constexpr,
):
    """Numbers of tokens as float32, whatever they are written as.

    Args:
        row: [tokens, 1] pointers to where a token's numbers, or its row of bytes, begin.
        dim: [1, lanes] which dims.
        mask: [tokens, lanes].
    """
    if encoding == "exact":
        return from_bits(tl.load(row + dim, mask=mask, other=0), number)
    elif encoding == "int4":
        parameters = head_dim // 2 + dim // _GROUP * 4
        scale = bfloat16_at(row, parameters, mask)
        minimum = bfloat16_at(row, parameters + 2, mask)
        both = tl.load(row + dim // 2, mask=mask, other=0).to(tl.int32) & 255
        return ((both >> (dim % 2 * 4)) & 15).to(tl.float32) * scale + minimum
    else:
        data = tl.load(row + dim, mask=mask, other=0)
        # The same address for all dims of a token, which a warp asks for once.
        scale = bfloat16_at(row, head_dim + dim * 0, mask)
        if encoding == "int8":
            # By way of 32 bits, sign extended: the bytes are unsigned.
            value = ((data.to(tl.int32) << 24) >> 24).to(tl.float32)
        else:
            value = from_bits(data, tl.float8e4nv)
        return value * scale


@triton.jit
def _put_scale(row, offset, value, mask):
    """Round to bfloat16, write it, and return what was written."""
    bits = bfloat16_bits(value)
    pointer = (row + offset).to(tl.pointer_type(tl.int16), bitcast=True)
    tl.store(pointer, bits.to(tl.int16), mask=mask)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(value, scale, low, high):
    """Divided and clamped; by a scale of 0, where all numbers are equal, to 0."""
    steps = tl.where(scale == 0, 0.0, tl.math.div_rn(value, tl.where(scale == 0, 1.0, scale)))
    # Nothing sensible is left of what is no number; its scale is none either.
    steps = tl.where(steps == steps, steps, 0.0)
    return tl.minimum(tl.maximum(steps, low), high)


@triton.jit
def store_rows(
    row,
    value,
    is_token,
    head_dim: tl.constexpr,
    dim_lanes: tl.constexpr,
    token_lanes: tl.constexpr,
    encoding: tl.constexpr,
):
    """Encode numbers and write their rows.

    Args:
        row: [token_lanes, 1] pointers to where each token's row of bytes begins.
        value: [token_lanes, dim_lanes] float32; lanes beyond head_dim are not read.
        is_token: [token_lanes].
    """
    if encoding == "int4":
        groups: tl.constexpr = dim_lanes // _GROUP
        flat_row = tl.reshape(row, [token_lanes, 1, 1])
        token = tl.reshape(is_token, [token_lanes, 1, 1])
        group = tl.arange(0, groups)[None, :, None]
        place = group * _GROUP + tl.arange(0, _GROUP)[None, None, :]
        number = tl.reshape(value, [token_lanes, groups, _GROUP])
        inside = place < head_dim
        low = tl.min(tl.where(inside, number, float("inf")), axis=2, keep_dims=True)
        high = tl.max(tl.where(inside, number, float("-inf")), axis=2, keep_dims=True)
        is_nan = tl.max((inside & (number != number)).to(tl.int32), axis=2, keep_dims=True) > 0
        low = tl.where(is_nan, float("nan"), low)
        high = tl.where(is_nan, float("nan"), high)
        has_group = token & (group * _GROUP < head_dim)
        parameters = head_dim // 2 + group * 4
        minimum = _put_scale(flat_row, parameters + 2, low, has_group)
        span = tl.math.div_rn(high - minimum, _INT4_LIMIT)
        scale = _put_scale(flat_row, parameters, span, has_group)
        steps = _scaled(number - minimum, scale, 0.0, _INT4_LIMIT)
        level = ((steps + _ROUNDER) - _ROUNDER).to(tl.int32)
        level = tl.where(inside, level, 0)
        left, right = tl.split(tl.reshape(level, [token_lanes, groups, _GROUP // 2, 2]))
        byte = group * (_GROUP // 2) + tl.arange(0, _GROUP // 2)[None, None, :]
        packed = (left | (right << 4)).to(tl.uint8)
        tl.store(flat_row + byte, packed, mask=token & (byte < head_dim // 2))
    else:
        dim = tl.arange(0, dim_lanes)[None, :]
        token = is_token[:, None]
        inside = dim < head_dim
        magnitude = tl.where(inside, tl.abs(value), 0.0)
        largest = tl.max(magnitude, axis=1, keep_dims=True)
        is_nan = tl.max((magnitude != magnitude).to(tl.int32), axis=1, keep_dims=True) > 0
        limit: tl.constexpr = _INT8_LIMIT if encoding == "int8" else _FP8_LIMIT
        largest = tl.where(is_nan, float("nan"), largest)
        scale = _put_scale(row, head_dim, tl.math.div_rn(largest, limit), token)
        scaled = _scaled(value, scale, -limit, limit)
        if encoding == "int8":
            data = ((scaled + _ROUNDER) - _ROUNDER).to(tl.int32)
        else:
            data = e4m3_bits(scaled)
        tl.store(row + dim, (data & 255).to(tl.uint8), mask=token & inside)
