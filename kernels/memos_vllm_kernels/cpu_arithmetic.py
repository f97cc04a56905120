"""Turning and encoding on a CPU in one pass each, compiled by numba.

The same arithmetic as `rotary` and `encoding`, number by number instead of tensor by tensor, at
about ten times the speed. Numbers are float32, or bfloat16 as uint16, for which numpy has no type;
every array is C-contiguous. A function is compiled at its first call, in about half a second, and
releases the GIL.
"""

from __future__ import annotations

import numba
import numpy as np
from numba.extending import overload

_compiled = numba.njit(nogil=True, error_model="numpy")
_inlined = numba.njit(nogil=True, error_model="numpy", inline="always")

_GROUP = 32
_INT8_LIMIT = np.float32(127)
_INT4_LIMIT = np.float32(15)
_FP8_LIMIT = np.float32(448)
_ZERO = np.float32(0)
_SMALLEST_NORMAL_FP8 = np.float32(2**-6)
_FP8_STEPS_BELOW = np.float32(2**9)


@_compiled
def _from_bfloat16(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_compiled
def _bfloat16_bits(number):
    """Rounded to nearest even."""
    bits = np.float32(number).view(np.uint32)
    odd = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.uint32(0x7FC0) if number != number else np.uint32(rounded)


def _get(numbers, place):
    """A number as float32, by the array's type."""


def _put(numbers, place, value):
    """The inverse."""


@overload(_get)
def _get_of(numbers, place):
    if numbers.dtype == numba.types.uint16:
        return lambda numbers, place: _from_bfloat16(numbers[place])
    return lambda numbers, place: numbers[place]


@overload(_put)
def _put_of(numbers, place, value):
    if numbers.dtype == numba.types.uint16:

        def put(numbers, place, value):
            numbers[place] = _bfloat16_bits(value)
    else:

        def put(numbers, place, value):
            numbers[place] = value

    return put


@_compiled
def turn(keys, angles, first_dim, interleaved, out):
    """Turn keys, and copy the dims that are not turned.

    Args:
        keys, out: [tokens, kv_heads, head_dim]; `out` is mutated.
        angles: cosines and sines, [tokens, pairs] float32 each.
    """
    cosines, sines = angles
    tokens, heads, dim = keys.shape
    pairs = cosines.shape[1]
    end = first_dim + 2 * pairs
    for token in range(tokens):
        cosine, sine = cosines[token], sines[token]
        for head in range(heads):
            source, target = keys[token, head], out[token, head]
            for place in range(first_dim):
                _put(target, place, _get(source, place))
            for place in range(end, dim):
                _put(target, place, _get(source, place))
            source, target = source[first_dim:end], target[first_dim:end]
            if interleaved:
                for pair in range(pairs):
                    left, right = _get(source, 2 * pair), _get(source, 2 * pair + 1)
                    _put(target, 2 * pair, left * cosine[pair] - right * sine[pair])
                    _put(target, 2 * pair + 1, right * cosine[pair] + left * sine[pair])
            else:
                near, far = source[:pairs], source[pairs:]
                near_out, far_out = target[:pairs], target[pairs:]
                for pair in range(pairs):
                    left, right = _get(near, pair), _get(far, pair)
                    _put(near_out, pair, left * cosine[pair] - right * sine[pair])
                    _put(far_out, pair, right * cosine[pair] + left * sine[pair])


@_compiled
def decode_int8(rows, out):
    """Rows [n, dim + 2] uint8 to numbers [n, dim]."""
    count, dim = out.shape
    for index in range(count):
        row, numbers = rows[index], out[index]
        scale = _bfloat16_at(row, dim)
        for place in range(dim):
            _put(numbers, place, np.float32(np.int8(row[place])) * scale)


@_compiled
def decode_fp8(rows, values, out):
    """Rows [n, dim + 2] uint8 to numbers [n, dim]; `values` are those of the 256 bytes."""
    count, dim = out.shape
    for index in range(count):
        row, numbers = rows[index], out[index]
        scale = _bfloat16_at(row, dim)
        for place in range(dim):
            _put(numbers, place, values[row[place]] * scale)


@_compiled
def decode_int4(rows, out):
    """Rows of nibbles, scales and minima, [n, row_bytes] uint8, to numbers [n, dim]."""
    count, dim = out.shape
    parameters = (dim + 1) // 2
    for index in range(count):
        row, numbers = rows[index], out[index]
        for start in range(0, dim, _GROUP):
            place = parameters + start // _GROUP * 4
            scale, minimum = _bfloat16_at(row, place), _bfloat16_at(row, place + 2)
            end = min(start + _GROUP, dim)
            group, target = row[start // 2 : (end + 1) // 2], numbers[start:end]
            for pair in range(len(target) // 2):
                low, high = _nibbles(group[pair])
                _put(target, 2 * pair, low * scale + minimum)
                _put(target, 2 * pair + 1, high * scale + minimum)
            if len(target) % 2:
                low, _ = _nibbles(group[len(group) - 1])
                _put(target, len(target) - 1, low * scale + minimum)


@_compiled
def encode_int8(numbers, out):
    """The inverse of `decode_int8`, rounded to nearest even."""
    count, dim = numbers.shape
    for index in range(count):
        source, row = numbers[index], out[index]
        scale = _put_scale(row, dim, _largest(source) / _INT8_LIMIT)
        for place in range(dim):
            scaled = _scaled(_get(source, place), scale, -_INT8_LIMIT, _INT8_LIMIT)
            row[place] = np.uint8(np.int32(np.rint(scaled)) & 255)


@_compiled
def encode_fp8(numbers, out):
    """The inverse of `decode_fp8`, rounded to nearest even."""
    count, dim = numbers.shape
    for index in range(count):
        source, row = numbers[index], out[index]
        scale = _put_scale(row, dim, _largest(source) / _FP8_LIMIT)
        for place in range(dim):
            scaled = _scaled(_get(source, place), scale, -_FP8_LIMIT, _FP8_LIMIT)
            row[place] = _fp8_bits(scaled)


@_compiled
def encode_int4(numbers, out):
    """The inverse of `decode_int4`, rounded to nearest even."""
    count, dim = numbers.shape
    parameters = (dim + 1) // 2
    levels = np.zeros(_GROUP, dtype=np.uint8)
    for index in range(count):
        row = out[index]
        for start in range(0, dim, _GROUP):
            end = min(start + _GROUP, dim)
            source = numbers[index, start:end]
            low, high = _bounds(source)
            place = parameters + start // _GROUP * 4
            minimum = _put_scale(row, place + 2, low)
            scale = _put_scale(row, place, (high - minimum) / _INT4_LIMIT)
            levels[:] = 0
            for place in range(len(source)):
                scaled = _scaled(_get(source, place) - minimum, scale, _ZERO, _INT4_LIMIT)
                levels[place] = np.uint8(np.int32(np.rint(scaled)))
            group = row[start // 2 : (end + 1) // 2]
            for pair in range(len(group)):
                group[pair] = levels[2 * pair] | levels[2 * pair + 1] << np.uint8(4)


@_compiled
def _nibbles(byte):
    return np.float32(np.int32(byte & np.uint8(15))), np.float32(np.int32(byte >> np.uint8(4)))


@_compiled
def _largest(source):
    """The largest magnitude; not a number when one is not, whose bits are the largest."""
    largest = np.uint32(0)
    for place in range(len(source)):
        bits = np.float32(_get(source, place)).view(np.uint32) & np.uint32(0x7FFFFFFF)
        largest = max(largest, bits)
    return np.uint32(largest).view(np.float32)


@_compiled
def _bounds(source):
    """Least and largest number, neither of them a number when one is not."""
    low, high, has_nan = _get(source, 0), _get(source, 0), False
    for place in range(len(source)):
        number = _get(source, place)
        low, high = min(low, number), max(high, number)
        has_nan |= number != number
    nan = np.float32(np.nan)
    return (nan, nan) if has_nan else (low, high)


@_inlined
def _scaled(number, scale, low, high):
    """Divided and clamped; by a scale of 0, where all numbers are equal, to 0."""
    scaled = _ZERO if scale == 0 else np.float32(number / scale)
    scaled = min(max(scaled, low), high)
    # Nothing sensible is left of what is no number; its scale is none either.
    return scaled if scaled == scaled else _ZERO


@_compiled
def _bfloat16_at(row, place):
    return _from_bfloat16(np.uint32(row[place]) | np.uint32(row[place + 1]) << np.uint32(8))


@_compiled
def _put_scale(row, place, number):
    """Round to bfloat16, write it, and return what was written."""
    bits = _bfloat16_bits(number)
    row[place], row[place + 1] = np.uint8(bits & 255), np.uint8(bits >> 8)
    return _from_bfloat16(bits)


@_compiled
def _fp8_bits(number):
    """One byte of e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa."""
    bits = np.float32(number).view(np.uint32)
    sign, magnitude = np.uint32(bits >> np.uint32(24)) & np.uint32(0x80), abs(number)
    small = np.uint32(np.int32(np.rint(magnitude * _FP8_STEPS_BELOW)))
    bits &= np.uint32(0x7FFFFFFF)
    odd = np.uint32(bits >> np.uint32(20)) & np.uint32(1)
    rounded = np.uint32(bits + np.uint32(0x7FFFF) + odd) >> np.uint32(20)
    normal = np.uint32(rounded - np.uint32((127 - 7) << 3))
    return np.uint8(sign | (small if magnitude < _SMALLEST_NORMAL_FP8 else normal))
