"""Turning and encoding on a CPU in one pass each, compiled by numba.

The same arithmetic as `rotary` and `encoding`, number by number instead of tensor by tensor: five
to fifteen times as fast on one core. Every array is C-contiguous. A function is compiled at its
first call, in about half a second, and releases the GIL.
"""

from __future__ import annotations

import numba
import numpy as np

_compiled = numba.njit(nogil=True, error_model="numpy")

_GROUP = 32
_INT8_LIMIT = np.float32(127)
_INT4_LIMIT = np.float32(15)
_FP8_LIMIT = np.float32(448)
_SMALLEST_NORMAL_FP8 = np.float32(2**-6)
_FP8_STEPS_BELOW = np.float32(2**9)


@_compiled
def turn(numbers, cosines, sines, first_dim, interleaved):
    """Turn keys in place.

    Args:
        numbers: [tokens, kv_heads, head_dim] float32, mutated.
        cosines, sines: [tokens, pairs] float32.
    """
    tokens, heads, _ = numbers.shape
    pairs = cosines.shape[1]
    for token in range(tokens):
        for head in range(heads):
            row = numbers[token, head, first_dim : first_dim + 2 * pairs]
            if interleaved:
                for pair in range(pairs):
                    left, right = row[2 * pair], row[2 * pair + 1]
                    cos, sin = cosines[token, pair], sines[token, pair]
                    row[2 * pair] = left * cos - right * sin
                    row[2 * pair + 1] = right * cos + left * sin
            else:
                for pair in range(pairs):
                    left, right = row[pair], row[pairs + pair]
                    cos, sin = cosines[token, pair], sines[token, pair]
                    row[pair] = left * cos - right * sin
                    row[pairs + pair] = right * cos + left * sin


@_compiled
def decode_int8(rows, out):
    """Rows [n, dim + 2] uint8 to numbers [n, dim] float32."""
    count, dim = out.shape
    for index in range(count):
        row, numbers = rows[index], out[index]
        scale = _bfloat16_at(row, dim)
        for place in range(dim):
            numbers[place] = np.float32(np.int8(row[place])) * scale


@_compiled
def decode_fp8(rows, values, out):
    """Rows [n, dim + 2] uint8 to numbers [n, dim] float32; `values` are those of the 256 bytes."""
    count, dim = out.shape
    for index in range(count):
        row, numbers = rows[index], out[index]
        scale = _bfloat16_at(row, dim)
        for place in range(dim):
            numbers[place] = values[row[place]] * scale


@_compiled
def decode_int4(rows, out):
    """Rows of nibbles, scales and minima, [n, row_bytes] uint8, to numbers [n, dim] float32."""
    count, dim = out.shape
    parameters = (dim + 1) // 2
    for index in range(count):
        row, numbers = rows[index], out[index]
        for start in range(0, dim, _GROUP):
            place = parameters + start // _GROUP * 4
            scale, minimum = _bfloat16_at(row, place), _bfloat16_at(row, place + 2)
            end = min(start + _GROUP, dim)
            for pair in range(start // 2, end // 2):
                both = row[pair]
                numbers[2 * pair] = np.float32(both & 15) * scale + minimum
                numbers[2 * pair + 1] = np.float32(both >> 4) * scale + minimum
            if end % 2:
                numbers[end - 1] = np.float32(row[end // 2] & 15) * scale + minimum


@_compiled
def encode_int8(numbers, out):
    """The inverse of `decode_int8`, rounded to nearest even."""
    count, dim = numbers.shape
    for index in range(count):
        source, row = numbers[index], out[index]
        scale = _put_scale(row, dim, _largest(source) / _INT8_LIMIT)
        for place in range(dim):
            row[place] = np.uint8(np.int8(_level(source[place], scale, _INT8_LIMIT)))


@_compiled
def encode_fp8(numbers, out):
    """The inverse of `decode_fp8`, rounded to nearest even."""
    count, dim = numbers.shape
    for index in range(count):
        source, row = numbers[index], out[index]
        scale = _put_scale(row, dim, _largest(source) / _FP8_LIMIT)
        for place in range(dim):
            row[place] = _fp8_bits(source[place], scale)


@_compiled
def encode_int4(numbers, out):
    """The inverse of `decode_int4`, rounded to nearest even."""
    count, dim = numbers.shape
    parameters = (dim + 1) // 2
    for index in range(count):
        source, row = numbers[index], out[index]
        row[:parameters] = 0
        for start in range(0, dim, _GROUP):
            end = min(start + _GROUP, dim)
            low, high = source[start], source[start]
            for place in range(start + 1, end):
                # Written so that what is no number stays: it compares as neither.
                number = source[place]
                low = low if low <= number or low != low else number
                high = high if high >= number or high != high else number
            place = parameters + start // _GROUP * 4
            minimum = _put_scale(row, place + 2, low)
            scale = _put_scale(row, place, (high - minimum) / _INT4_LIMIT)
            for place in range(start, end):
                steps = np.float32(0) if scale == 0 else (source[place] - minimum) / scale
                steps = min(max(steps, np.float32(0)), _INT4_LIMIT)
                level = np.uint8(np.rint(steps)) if steps == steps else np.uint8(0)
                row[place // 2] |= level << np.uint8(place % 2 * 4)


@_compiled
def _largest(source):
    """The largest magnitude; not a number when one is not."""
    largest = np.float32(0)
    for place in range(len(source)):
        magnitude = abs(source[place])
        largest = largest if largest >= magnitude or largest != largest else magnitude
    return largest


@_compiled
def _level(number, scale, limit):
    scaled = np.float32(0) if scale == 0 else number / scale
    scaled = min(max(scaled, -limit), limit)
    return np.rint(scaled) if scaled == scaled else np.float32(0)


@_compiled
def _bfloat16_at(row, place):
    bits = np.uint32(row[place]) | np.uint32(row[place + 1]) << np.uint32(8)
    return np.uint32(bits << np.uint32(16)).view(np.float32)


@_compiled
def _put_scale(row, place, number):
    """Round to bfloat16, write it, and return what was written."""
    bits = np.float32(number).view(np.uint32)
    if number != number:
        bits = np.uint32(0x7FC0)
    else:
        odd = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
        bits = np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    row[place], row[place + 1] = np.uint8(bits & 255), np.uint8(bits >> 8)
    return _bfloat16_at(row, place)


@_compiled
def _fp8_bits(number, scale):
    """One byte of e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7F is no number."""
    scaled = np.float32(0) if scale == 0 else np.float32(number / scale)
    scaled = min(max(scaled, -_FP8_LIMIT), _FP8_LIMIT)
    bits = np.float32(scaled).view(np.uint32)
    sign, magnitude = np.uint32(bits >> np.uint32(24)) & np.uint32(0x80), abs(scaled)
    if scaled != scaled:
        found = np.uint32(0x7F)
    elif magnitude < _SMALLEST_NORMAL_FP8:
        found = np.uint32(np.rint(magnitude * _FP8_STEPS_BELOW))
    else:
        bits = bits & np.uint32(0x7FFFFFFF)
        odd = np.uint32(bits >> np.uint32(20)) & np.uint32(1)
        rounded = np.uint32(bits + np.uint32(0x7FFFF) + odd) >> np.uint32(20)
        found = np.uint32(rounded - np.uint32((127 - 7) << 3))
    return np.uint8(sign | found)
