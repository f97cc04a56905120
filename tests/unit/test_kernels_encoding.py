"""Encoded KV is as small as promised, and decodes to within its step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_vllm_kernels import KernelInputError
from memos_vllm_kernels.encoding import INT4_GROUP, Encoding, decode, encode

LOSSY = (Encoding.INT8, Encoding.INT4, Encoding.FP8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sample(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Like keys: some dims much larger than others, and not centred."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(shape[-1], generator=generator) * 8
    return ((torch.randn(shape, generator=generator) + 0.5) * spread).to(dtype)


def round_trip(tokens: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    rows = encode(tokens, encoding)
    assert rows.shape[-1] == encoding.row_bytes(tokens.shape[-1], dtype=tokens.dtype)
    return decode(rows, encoding, head_dim=tokens.shape[-1], dtype=tokens.dtype)


def largest_error(tokens: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """What a step, the rounded scale and the result's own rounding may do; [tokens, heads, dim]."""
    numbers = tokens.float()
    bound = numbers.abs().amax(-1, keepdim=True).expand_as(numbers)
    rounding = torch.finfo(tokens.dtype).eps * bound
    if encoding is Encoding.INT8:
        return bound / 127 * 0.51 + bound * 2**-8 + rounding
    if encoding is Encoding.FP8:
        # Three bits behind the point, or the step of the subnormals.
        return numbers.abs() / 16 + bound / 448 * 2**-9 + bound * 2**-8 + rounding
    spans = []
    for group in numbers.split(INT4_GROUP, dim=-1):
        span = group.amax(-1, keepdim=True) - group.amin(-1, keepdim=True)
        spans.append((span + 2**-7 * bound[..., :1]).expand_as(group))
    return (
        torch.cat(spans, -1) / 15 * 0.55 + torch.cat(spans, -1) * 2**-8 + bound * 2**-8 + rounding
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize("shape", [(1, 1, 64), (7, 3, 80), (33, 2, 128), (5, 1, 31), (2, 2, 256)])
def test_an_error_is_at_most_half_a_step(
    shape: tuple[int, int, int], encoding: Encoding, dtype: torch.dtype
) -> None:
    tokens = sample(*shape, dtype=dtype)
    error = (round_trip(tokens, encoding).float() - tokens.float()).abs()
    assert bool((error <= largest_error(tokens, encoding)).all())


@settings(max_examples=60, deadline=None)
@given(
    encoding=st.sampled_from(LOSSY),
    heads=st.integers(1, 4),
    dim=st.integers(1, 96),
    magnitude=st.floats(1e-6, 1e4),
    seed=st.integers(0, 2**16),
)
def test_any_numbers_come_back_near_and_finite(
    encoding: Encoding, heads: int, dim: int, magnitude: float, seed: int
) -> None:
    tokens = (sample(4, heads, dim, dtype=torch.float32, seed=seed) * magnitude).float()
    decoded = round_trip(tokens, encoding)
    assert bool(torch.isfinite(decoded).all())
    assert bool(((decoded - tokens).abs() <= largest_error(tokens, encoding)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_rows_are_the_pages_own_bytes(dtype: torch.dtype) -> None:
    tokens = sample(9, 2, 48, dtype=dtype)
    tokens[0, 0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0], dtype=dtype)
    assert torch.equal(
        round_trip(tokens, Encoding.EXACT).view(torch.uint8), tokens.view(torch.uint8)
    )


@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize("value", [0.0, 3.0, -0.171875])
def test_equal_numbers_stay_equal(encoding: Encoding, value: float) -> None:
    tokens = torch.full((3, 2, 64), value, dtype=torch.bfloat16)
    decoded = round_trip(tokens, encoding)
    assert len(decoded.unique()) == 1
    torch.testing.assert_close(decoded, tokens, rtol=2**-7, atol=0)


@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_hidden(encoding: Encoding, bad: float) -> None:
    tokens = sample(2, 1, 64)
    tokens[1, 0, 5] = bad
    decoded = round_trip(tokens, encoding)
    assert bool(torch.isfinite(decoded[0]).all())
    assert not torch.isfinite(decoded[1]).all()


@pytest.mark.parametrize(
    ("encoding", "most"), [(Encoding.INT8, 0.53), (Encoding.FP8, 0.53), (Encoding.INT4, 0.32)]
)
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_rows_are_as_small_as_promised(encoding: Encoding, most: float, dim: int) -> None:
    assert encoding.row_bytes(dim, dtype=torch.bfloat16) <= most * 2 * dim


def test_strided_and_empty_tokens_are_encoded_as_dense_ones() -> None:
    wide = sample(6, 4, 128)
    strided = wide[::2, :, ::2]
    for encoding in Encoding:
        assert torch.equal(encode(strided, encoding), encode(strided.contiguous(), encoding))
        assert round_trip(wide[:0], encoding).shape == (0, 4, 128)


def test_what_is_no_row_is_refused() -> None:
    rows = encode(sample(2, 1, 64), Encoding.INT8)
    with pytest.raises(KernelInputError, match=r"expected bytes \[tokens, heads, 66\]"):
        decode(rows[..., :-1], Encoding.INT8, head_dim=64, dtype=torch.bfloat16)
    with pytest.raises(KernelInputError, match="expected floats"):
        encode(torch.zeros(2, 1, 64, dtype=torch.int32), Encoding.INT4)
