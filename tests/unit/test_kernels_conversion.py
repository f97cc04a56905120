"""The compiled CPU arithmetic gives the bits of plain torch, and plain torch stands in for it."""

from __future__ import annotations

import pytest
import torch
from bit_patterns import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_vllm_kernels import Encoding, RotaryTable, Rotation, conversion
from memos_vllm_kernels.encoding import decode, encode
from memos_vllm_kernels.rotary import rotate_keys

SMALLER = (Encoding.INT8, Encoding.INT4, Encoding.FP8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
each_encoding = pytest.mark.parametrize("encoding", SMALLER)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def numbers_of(
    tokens: int, heads: int, dim: int, *, dtype: torch.dtype, seed: int = 0, spread: float = 1.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn((tokens, heads, dim), generator=generator) * spread).to(dtype)


def rows_of(numbers: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    width = encoding.row_bytes(numbers.shape[-1], dtype=numbers.dtype)
    rows = torch.full((*numbers.shape[:2], width), 0xAB, dtype=torch.uint8)
    conversion.to_rows(numbers, encoding, out=rows)
    return rows


@each_encoding
@each_dtype
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 9),
    heads=st.integers(1, 4),
    dim=st.integers(1, 130),
    spread=st.sampled_from([1e-30, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**16),
)
def test_rows_are_those_of_plain_torch(
    *,
    tokens: int,
    heads: int,
    dim: int,
    spread: float,
    seed: int,
    dtype: torch.dtype,
    encoding: Encoding,
) -> None:
    numbers = numbers_of(tokens, heads, dim, dtype=dtype, seed=seed, spread=spread)
    numbers[0, 0] = numbers[0, 0, 0]
    rows = rows_of(numbers, encoding)
    assert torch.equal(rows, encode(numbers, encoding))
    back = torch.full_like(numbers, float("nan"))
    conversion.from_rows(rows, encoding, out=back)
    assert torch.equal(bits(back), bits(decode(rows, encoding, head_dim=dim, dtype=dtype)))


@each_dtype
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize("first_dim", [0, 16])
def test_keys_turn_as_plain_torch_turns_them(
    first_dim: int, interleaved: bool, dtype: torch.dtype
) -> None:
    keys = numbers_of(50, 3, 80, dtype=dtype)
    frequencies = 10_000.0 ** -(torch.arange(0, 64, 2) / 64)
    table = RotaryTable.of(frequencies, interleaved=interleaved, first_dim=first_dim)
    rotation = Rotation(torch.arange(50) * 61 - 900, table)
    out = torch.full_like(keys, float("nan"))
    conversion.from_rows(keys, Encoding.EXACT, out=out, angles=rotation.angles())
    assert torch.equal(bits(out), bits(rotate_keys(keys, rotation.deltas, table)))


@each_encoding
def test_strided_numbers_and_rows_are_read_and_written_in_place(encoding: Encoding) -> None:
    wide = numbers_of(20, 6, 64, dtype=torch.bfloat16)
    width = encoding.row_bytes(64, dtype=torch.bfloat16)
    rows = torch.full((20, 6, width), 0xAB, dtype=torch.uint8)
    conversion.to_rows(wide[:, 1:3], encoding, out=rows[:, 2:4])
    assert torch.equal(rows[:, 2:4], encode(wide[:, 1:3], encoding))
    assert (rows[:, :2] == 0xAB).all()
    assert (rows[:, 4:] == 0xAB).all()
    back = torch.zeros_like(wide)
    conversion.from_rows(rows[:, 2:4], encoding, out=back[:, 5:].expand(-1, 2, -1).clone())
    conversion.from_rows(rows[:, 2:4], encoding, out=back[:, 3:5])
    wanted = decode(rows[:, 2:4].contiguous(), encoding, head_dim=64, dtype=torch.bfloat16)
    assert torch.equal(bits(back[:, 3:5]), bits(wanted))
    assert not back[:, :3].any()


@each_encoding
def test_what_is_no_number_spoils_its_own_group_and_no_other(encoding: Encoding) -> None:
    numbers = numbers_of(5, 2, 64, dtype=torch.float32)
    numbers[1, 0, 3], numbers[2, 1, 40], numbers[3, 0, 5] = (
        float("nan"),
        float("inf"),
        float("-inf"),
    )
    back = torch.zeros_like(numbers)
    conversion.from_rows(rows_of(numbers, encoding), encoding, out=back)
    spoilt = ~torch.isfinite(back).all(-1)
    assert spoilt.nonzero().tolist() == [[1, 0], [2, 1], [3, 0]]


@each_encoding
def test_without_numba_plain_torch_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, encoding: Encoding
) -> None:
    numbers = numbers_of(30, 2, 96, dtype=torch.bfloat16)
    table = RotaryTable.of(10_000.0 ** -(torch.arange(0, 96, 2) / 96))
    angles = Rotation(torch.arange(30) * 7, table).angles()
    results = []
    for is_missing in (False, True):
        if is_missing:
            monkeypatch.setattr(conversion, "_fast", lambda _: None)
        rows, back = rows_of(numbers, encoding), torch.empty_like(numbers)
        conversion.from_rows(rows, encoding, out=back, angles=angles)
        results.append((rows, bits(back)))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


@each_dtype
def test_exact_numbers_that_are_not_turned_are_copied(dtype: torch.dtype) -> None:
    numbers = numbers_of(9, 2, 64, dtype=dtype)
    out = torch.zeros_like(numbers)
    conversion.from_rows(numbers, Encoding.EXACT, out=out)
    assert torch.equal(bits(out), bits(numbers))
