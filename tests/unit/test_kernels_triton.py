"""The Triton kernels, interpreted, move the same bits as plain torch in every physical layout."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import pytest
import torch
from bit_patterns import any_bits, bits
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_layout import KVCacheLayout

from memos_vllm_kernels import Packing, plain_pages
from memos_vllm_kernels.layout import PageGeometry
from memos_vllm_kernels.rotary import RotaryTable, Rotation, rotate_keys

NUM_BLOCKS = 9
# Turned keys are rounded once from float32, whose sine and cosine may differ in the last place.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The kernels for the interpreter, which Triton chooses when they are defined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import memos_vllm_kernels.triton_pages as module

        assert os.environ["TRITON_INTERPRET"] == "1"
        yield module


class Pool:
    """Pages of a few layers in one of vLLM's physical orders."""

    def __init__(
        self,
        *,
        layers: int = 2,
        heads: int = 2,
        block_size: int = 16,
        dim: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        order: KVCacheLayout = KVCacheLayout.LBHNC,
        seed: int = 1,
    ) -> None:
        logical = (layers, NUM_BLOCKS, heads, block_size, 2 * dim)
        physical = [logical[axis] for axis in order.stride_order]
        self.storage = any_bits(*physical, dtype=dtype, seed=seed)
        places = [order.stride_order.index(axis) for axis in range(5)]
        self.pages = list(self.storage.permute(places).unbind(0))
        self.geometry = PageGeometry(heads, dim, block_size, dtype, Packing.PLAIN)

    def canonical(self, num_tokens: int, *, seed: int = 2) -> torch.Tensor:
        geometry = self.geometry
        shape = (len(self.pages), 2, num_tokens, geometry.num_kv_heads, geometry.head_dim)
        return any_bits(*shape, dtype=geometry.dtype, seed=seed)

    def expect(self, kv: torch.Tensor, slots: torch.Tensor) -> list[torch.Tensor]:
        """What plain torch makes of these pages."""
        expected = [page.clone() for page in self.pages]
        for page, (key, value) in zip(expected, kv, strict=True):
            plain_pages.import_slots(page, self.geometry, key, value, slots)
        return expected


def assert_same(pages: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for page, wanted in zip(pages, expected, strict=True):
        assert torch.equal(bits(page), bits(wanted))


def slots_of(num_tokens: int, block_size: int, *, seed: int = 3) -> torch.Tensor:
    """As many slots, in any order, each once."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(NUM_BLOCKS * block_size, generator=generator)[:num_tokens]


@pytest.mark.parametrize("order", list(KVCacheLayout), ids=lambda order: order.name)
def test_every_layout_that_vllm_declares_is_the_same_kernel(
    kernels: ModuleType, order: KVCacheLayout
) -> None:
    pool = Pool(order=order, layers=3)
    kv, slots = pool.canonical(33), slots_of(33, 16)
    expected = pool.expect(kv, slots)
    kernels.import_layers(pool.pages, pool.geometry, kv, slots)
    assert_same(pool.pages, expected)

    out = torch.full_like(kv.float(), float("nan")).to(torch.bfloat16)
    ids = torch.tensor([5, 2, 7])
    kernels.export_layers(pool.pages, pool.geometry, ids, token_start=3, out=out)
    wanted = (ids[:, None] * 16 + torch.arange(16)).flatten()[3 : 3 + 33]
    for page, (key, value) in zip(pool.pages, out, strict=True):
        key_truth, value_truth = torch.empty_like(key), torch.empty_like(value)
        plain_pages.export_slots(page, pool.geometry, wanted, key_truth, value_truth)
        assert torch.equal(bits(key), bits(key_truth))
        assert torch.equal(bits(value), bits(value_truth))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, FP8], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_any_head_size_and_dtype_moves_bit_for_bit(
    kernels: ModuleType, dim: int, dtype: torch.dtype
) -> None:
    pool = Pool(dim=dim, dtype=dtype, heads=1)
    kv, slots = pool.canonical(5), slots_of(5, 16)
    expected = pool.expect(kv, slots)
    kernels.import_layers(pool.pages, pool.geometry, kv, slots)
    assert_same(pool.pages, expected)


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 31, 64])
@pytest.mark.parametrize("block_size", [16, 32, 256])
def test_export_after_import_is_the_identity_and_neighbours_stay(
    kernels: ModuleType, block_size: int, num_tokens: int
) -> None:
    pool = Pool(block_size=block_size)
    kv = pool.canonical(num_tokens)
    ids = torch.arange(NUM_BLOCKS - 1, -1, -1)
    slots = (ids[:, None] * block_size + torch.arange(block_size)).flatten()[:num_tokens]
    expected = pool.expect(kv, slots)
    kernels.import_layers(pool.pages, pool.geometry, kv, slots)
    assert_same(pool.pages, expected)
    out = torch.full(kv.shape, float("nan"), dtype=kv.dtype)
    kernels.export_layers(pool.pages, pool.geometry, ids, token_start=0, out=out)
    assert torch.equal(bits(out), bits(kv))


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 5),
    num_tokens=st.integers(0, 40),
    repeated=st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=4, max_size=6),
    token_start=st.integers(0, 20),
    seed=st.integers(0, 2**16),
)
def test_any_range_of_repeated_blocks_is_read_as_plain_torch_reads_it(
    kernels: ModuleType,
    *,
    heads: int,
    num_tokens: int,
    repeated: list[int],
    token_start: int,
    seed: int,
) -> None:
    pool = Pool(heads=heads, dim=16, seed=seed, layers=1)
    ids = torch.tensor(repeated)
    out = torch.full((1, 2, num_tokens, heads, 16), float("nan"), dtype=torch.bfloat16)
    kernels.export_layers(pool.pages, pool.geometry, ids, token_start=token_start, out=out)
    slots = (ids[:, None] * 16 + torch.arange(16)).flatten()[token_start : token_start + num_tokens]
    key, value = torch.empty_like(out[0, 0]), torch.empty_like(out[0, 1])
    plain_pages.export_slots(pool.pages[0], pool.geometry, slots, key, value)
    assert torch.equal(bits(out[0]), bits(torch.stack((key, value))))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (80, 80), (96, 24), (128, 128)])
def test_keys_are_turned_on_their_way_in_and_values_are_not(
    kernels: ModuleType, dim: int, rotary_dim: int, interleaved: bool, dtype: torch.dtype
) -> None:
    pool = Pool(dim=dim, dtype=dtype, order=KVCacheLayout.LBNHC)
    generator = torch.Generator().manual_seed(4)
    kv = torch.randn((2, 2, 21, 2, dim), generator=generator).to(dtype)
    slots = slots_of(21, 16)
    deltas = torch.randint(-3000, 3000, (21,), generator=generator)
    frequencies = 10_000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    table = RotaryTable.of(frequencies, interleaved=interleaved)
    before = [page.clone() for page in pool.pages]
    kernels.import_layers(pool.pages, pool.geometry, kv, slots, rotation=Rotation(deltas, table))

    for page, old, (key, value) in zip(pool.pages, before, kv, strict=True):
        key_found, value_found = torch.empty_like(key), torch.empty_like(value)
        plain_pages.export_slots(page, pool.geometry, slots, key_found, value_found)
        assert torch.equal(bits(value_found), bits(value))
        assert torch.equal(bits(key_found[..., rotary_dim:]), bits(key[..., rotary_dim:]))
        turned = rotate_keys(key, deltas, table)
        torch.testing.assert_close(key_found, turned, rtol=0, atol=2 * TOLERANCE[dtype])
        # Nothing but these slots has changed.
        plain_pages.import_slots(old, pool.geometry, key_found, value_found, slots)
        assert torch.equal(bits(page), bits(old))
