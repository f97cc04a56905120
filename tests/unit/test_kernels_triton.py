"""The Triton kernels, interpreted, do what plain torch does, in every layout of pages."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from bit_patterns import any_bits, bits
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_layout import KVCacheLayout

from memos_vllm_kernels import (
    Encoding,
    KernelInputError,
    KvPages,
    Packing,
    RotaryTable,
    Rotation,
    export_blocks,
    import_blocks,
    slot_mapping,
)
from memos_vllm_kernels.layout import PageGeometry

pytestmark = pytest.mark.usefixtures("on_device")

NUM_BLOCKS = 9
# Of numbers around 1 that are turned: once rounded from float32, whose products may be fused.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
    torch.float8_e4m3fn: 0.26,
    torch.float8_e5m2: 0.51,
}
FP8 = torch.float8_e4m3fn
PLAIN_PACKINGS = (Packing.PLAIN, Packing.PLANES, Packing.LATENT)
SMALLER = (Encoding.INT8, Encoding.INT4, Encoding.FP8)


@dataclass
class Twins:
    """Two pools of the same pages: one for the kernels, one for plain torch."""

    triton: KvPages
    torch: KvPages
    pages: list[torch.Tensor]
    expected: list[torch.Tensor]

    @property
    def geometry(self) -> PageGeometry:
        return self.triton.geometry

    def assert_same(self) -> None:
        for page, wanted in zip(self.pages, self.expected, strict=True):
            assert torch.equal(bits(page), bits(wanted))

    def kv(self, num_tokens: int, *, seed: int = 2) -> torch.Tensor:
        """Canonical numbers of every bit pattern."""
        shape = self.triton.layer_shape(num_tokens, Encoding.EXACT)
        return any_bits(self.triton.num_layers, *shape, dtype=self.geometry.dtype, seed=seed)

    def usual_kv(self, num_tokens: int) -> torch.Tensor:
        """Canonical numbers around 1."""
        shape = (self.triton.num_layers, *self.triton.layer_shape(num_tokens, Encoding.EXACT))
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(4), device="cpu")
        drawn = drawn.to(self.triton.number_dtype).to(self.triton.device)
        return drawn.view(self.geometry.dtype)


def twins(
    packing: Packing = Packing.PLAIN,
    *,
    layers: int = 2,
    heads: int = 2,
    block_size: int = 16,
    dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    order: KVCacheLayout = KVCacheLayout.LBHNC,
    kv_cache_dtype: str = "auto",
    seed: int = 1,
) -> Twins:
    heads = 1 if packing is Packing.LATENT else heads
    geometry = PageGeometry(heads, dim, block_size, dtype, packing)
    logical = (layers, NUM_BLOCKS, *geometry.page_shape)
    physical = [logical[axis] for axis in order.stride_order]
    places = [order.stride_order.index(axis) for axis in range(5)]

    def pages() -> list[torch.Tensor]:
        storage = any_bits(*physical, dtype=dtype, seed=seed)
        return list(storage.permute(places).unbind(0))

    mine, expected = pages(), pages()
    return Twins(
        KvPages(mine, geometry, kv_cache_dtype=kv_cache_dtype, kernels="triton"),
        KvPages(expected, geometry, kv_cache_dtype=kv_cache_dtype, kernels="torch"),
        mine,
        expected,
    )


def slots_of(num_tokens: int, block_size: int, *, seed: int = 3) -> torch.Tensor:
    """As many slots, in any order, each once."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(NUM_BLOCKS * block_size, generator=generator, device="cpu")
    return drawn[:num_tokens].to(torch.get_default_device())


def table_of(rotary_dim: int, *, interleaved: bool = False, first_dim: int = 0) -> RotaryTable:
    frequencies = 10_000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    return RotaryTable.of(frequencies, interleaved=interleaved, first_dim=first_dim)


def deltas_of(num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(-3000, 3000, (num_tokens,), generator=generator, device="cpu")
    return drawn.to(torch.get_default_device())


@pytest.mark.parametrize("packing", PLAIN_PACKINGS)
@pytest.mark.parametrize("order", list(KVCacheLayout), ids=lambda order: order.name)
def test_every_physical_order_is_the_same_kernel(order: KVCacheLayout, packing: Packing) -> None:
    both = twins(packing, order=order, layers=3)
    kv, slots = both.kv(33), slots_of(33, 16)
    import_blocks(both.triton, kv, slots)
    import_blocks(both.torch, kv, slots)
    both.assert_same()

    ids = torch.tensor([5, 2, 7])
    out = torch.full(kv.shape, float("nan"), dtype=kv.dtype)
    export_blocks(both.triton, ids, 33, out, token_start=3)
    assert torch.equal(bits(out), bits(export_blocks(both.torch, ids, 33, token_start=3)))


@pytest.mark.parametrize("packing", PLAIN_PACKINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, FP8], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256, 576])
def test_any_head_size_and_dtype_moves_bit_for_bit(
    dim: int, dtype: torch.dtype, packing: Packing
) -> None:
    cache_dtype = "fp8" if dtype is FP8 else "auto"
    both = twins(packing, dim=dim, dtype=dtype, heads=3, kv_cache_dtype=cache_dtype)
    kv, slots = both.kv(5), slots_of(5, 16)
    import_blocks(both.triton, kv, slots)
    import_blocks(both.torch, kv, slots)
    both.assert_same()


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 31, 64])
@pytest.mark.parametrize("block_size", [16, 32, 256])
def test_export_after_import_is_the_identity_and_neighbours_stay(
    block_size: int, num_tokens: int
) -> None:
    both = twins(block_size=block_size)
    kv, ids = both.kv(num_tokens), torch.arange(NUM_BLOCKS - 1, -1, -1)
    slots = slot_mapping(ids, block_size, num_tokens=num_tokens)
    import_blocks(both.triton, kv, slots)
    import_blocks(both.torch, kv, slots)
    both.assert_same()
    out = torch.full(kv.shape, float("nan"), dtype=kv.dtype)
    export_blocks(both.triton, ids, num_tokens, out)
    assert torch.equal(bits(out), bits(kv))


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 32),
    num_tokens=st.integers(0, 40),
    repeated=st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=4, max_size=6),
    token_start=st.integers(0, 20),
    seed=st.integers(0, 2**16),
)
def test_any_range_of_repeated_blocks_is_read_as_plain_torch_reads_it(
    *, heads: int, num_tokens: int, repeated: list[int], token_start: int, seed: int
) -> None:
    both = twins(heads=heads, dim=16, seed=seed, layers=1)
    ids = torch.tensor(repeated)
    out = torch.full((1, 2, num_tokens, heads, 16), float("nan"), dtype=torch.bfloat16)
    export_blocks(both.triton, ids, num_tokens, out, token_start=token_start)
    wanted = export_blocks(both.torch, ids, num_tokens, token_start=token_start)
    assert torch.equal(bits(out), bits(wanted))


def assert_close(both: Twins, slots: torch.Tensor, *, dtype: torch.dtype) -> None:
    """What was imported agrees, and nothing but these slots has changed."""
    size = both.geometry.block_size
    for found, wanted in zip(both.pages, both.expected, strict=True):
        left, right = both.geometry.halves_of(found), both.geometry.halves_of(wanted)
        chosen = [half[:, slots // size, :, slots % size] for half in (left, right)]
        numbers = [half.view(both.triton.number_dtype).float() for half in chosen]
        torch.testing.assert_close(*numbers, rtol=0, atol=2 * TOLERANCE[dtype])
        # Where the rounding of one bit differs, take the other, and compare all.
        right[:, slots // size, :, slots % size] = chosen[0]
        assert torch.equal(bits(found), bits(wanted))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (80, 80), (96, 24), (128, 128)])
def test_keys_are_turned_on_their_way_in_and_values_are_not(
    dim: int, rotary_dim: int, interleaved: bool, dtype: torch.dtype
) -> None:
    cache_dtype = {FP8: "fp8", torch.float8_e5m2: "fp8_e5m2"}.get(dtype, "auto")
    stored = torch.uint8 if dtype.itemsize == 1 else dtype
    both = twins(dim=dim, dtype=stored, order=KVCacheLayout.LBNHC, kv_cache_dtype=cache_dtype)
    kv, slots = both.usual_kv(21), slots_of(21, 16)
    rotation = Rotation(deltas_of(21), table_of(rotary_dim, interleaved=interleaved))
    import_blocks(both.triton, kv, slots, rotation=rotation)
    import_blocks(both.torch, kv, slots, rotation=rotation)
    # A row of 16 slots is a block, so that the slots' order is the tokens'.
    found = both.geometry.halves_of(both.pages[0])[:, slots // 16, :, slots % 16]
    keys, values = found.transpose(0, 1).unbind(0) if found.shape[0] != 2 else found.unbind(0)
    assert torch.equal(bits(values), bits(kv[0, 1]))
    assert torch.equal(bits(keys[..., rotary_dim:]), bits(kv[0, 0][..., rotary_dim:]))
    assert not torch.equal(bits(keys), bits(kv[0, 0]))
    assert_close(both, slots, dtype=dtype)


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
def test_of_a_latent_only_its_last_dims_are_turned(interleaved: bool) -> None:
    both = twins(Packing.LATENT, dim=96)
    kv, slots = both.usual_kv(21), slots_of(21, 16)
    rotation = Rotation(deltas_of(21), table_of(32, interleaved=interleaved, first_dim=64))
    import_blocks(both.triton, kv, slots, rotation=rotation)
    import_blocks(both.torch, kv, slots, rotation=rotation)
    found = both.geometry.halves_of(both.pages[1])[0, slots // 16, :, slots % 16]
    assert torch.equal(bits(found[..., :64]), bits(kv[1, 0][..., :64]))
    assert not torch.equal(bits(found[..., 64:]), bits(kv[1, 0][..., 64:]))
    assert_close(both, slots, dtype=torch.bfloat16)


@pytest.mark.parametrize("encoding", SMALLER)
@pytest.mark.parametrize("packing", PLAIN_PACKINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
def test_rows_are_written_and_read_as_plain_torch_does(
    dim: int, dtype: torch.dtype, packing: Packing, encoding: Encoding
) -> None:
    both = twins(packing, dim=dim, dtype=dtype, layers=1, heads=3)
    # Rows of numbers that are all alike, and of zeros, have a scale of 0.
    kv, ids = both.usual_kv(40), torch.tensor([8, 1, 4])
    kv[0, :, 3], kv[0, :, 4] = 0.0, 1.5
    slots = slot_mapping(ids, 16, num_tokens=40)
    import_blocks(both.triton, kv, slots)
    import_blocks(both.torch, kv, slots)

    shape = (1, *both.triton.layer_shape(37, encoding))
    rows, wanted = torch.full(shape, 0xAB, dtype=torch.uint8), torch.empty(shape, dtype=torch.uint8)
    export_blocks(both.triton, ids, 37, rows, token_start=2, encoding=encoding)
    export_blocks(both.torch, ids, 37, wanted, token_start=2, encoding=encoding)
    assert torch.equal(rows, wanted)

    import_blocks(both.triton, rows, slots[:37], encoding=encoding)
    import_blocks(both.torch, rows, slots[:37], encoding=encoding)
    both.assert_same()


@pytest.mark.parametrize("encoding", SMALLER)
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
def test_rows_are_decoded_and_turned_in_one_go(encoding: Encoding, interleaved: bool) -> None:
    both = twins(dim=80, order=KVCacheLayout.BLHNC)
    slots, ids = slots_of(21, 16), torch.tensor([0, 1])
    import_blocks(both.torch, both.usual_kv(21), slot_mapping(ids, 16, num_tokens=21))
    import_blocks(both.triton, both.usual_kv(21), slot_mapping(ids, 16, num_tokens=21))
    rows = export_blocks(both.torch, ids, 21, encoding=encoding)
    rotation = Rotation(deltas_of(21), table_of(32, interleaved=interleaved))
    import_blocks(both.triton, rows, slots, encoding=encoding, rotation=rotation)
    import_blocks(both.torch, rows, slots, encoding=encoding, rotation=rotation)
    assert_close(both, slots, dtype=torch.bfloat16)


@pytest.mark.parametrize("encoding", SMALLER)
def test_what_is_no_number_is_none_after_the_way_there_and_back(encoding: Encoding) -> None:
    both, ids = twins(layers=1, heads=1), torch.tensor([3])
    slots = slot_mapping(ids, 16, num_tokens=4)
    kv = both.usual_kv(4)
    kv[0, 0, 1, 0, 5], kv[0, 1, 2, 0, 40] = float("nan"), float("inf")
    import_blocks(both.triton, kv, slots)
    rows = export_blocks(both.triton, ids, 4, encoding=encoding)
    import_blocks(both.triton, rows, slots, encoding=encoding)
    found = export_blocks(both.triton, ids, 4)
    finite = torch.isfinite(torch.as_tensor(found)).all(-1)[0, :, :, 0]
    assert finite.tolist() == [[True, False, True, True], [True, True, False, True]]


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_pages_are_rounded_once(name: str) -> None:
    """Ties between two fp8 numbers, and their neighbours that are none in float32 only."""
    both = twins(layers=1, heads=1, dtype=torch.uint8, kv_cache_dtype=name)
    scale = torch.tensor(213 / 128 * 2.0**-7).bfloat16()
    width = both.triton.layer_shape(0, Encoding.INT8)[-1]
    rows = torch.zeros((1, 2, 128, 1, width), dtype=torch.uint8)
    for token in range(128):
        rows[0, :, token, 0, :64] = torch.arange(64, dtype=torch.uint8) + token
        rows[0, :, token, 0, 64:] = (scale * 2.0 ** (token % 30 - 20)).view(1).view(torch.uint8)
    import_blocks(both.triton, rows, torch.arange(128), encoding=Encoding.INT8)
    import_blocks(both.torch, rows, torch.arange(128), encoding=Encoding.INT8)
    both.assert_same()


def test_rows_at_odd_addresses_are_refused() -> None:
    both = twins(layers=1)
    width = both.triton.layer_shape(3, Encoding.INT8)[-1]
    rows = torch.zeros(2 * 3 * 2 * width + 1, dtype=torch.uint8)[1:].view(1, 2, 3, 2, width)
    with pytest.raises(KernelInputError, match="even addresses"):
        import_blocks(both.triton, rows, torch.tensor([0, 1, 2]), encoding=Encoding.INT8)
    both.assert_same()


def test_pools_of_more_than_two_to_the_31_numbers_are_addressed() -> None:
    """4.3 GB of addresses, of which a few pages are ever touched."""
    heads, size, dim = 2, 16, 128
    num_blocks = 2**31 // (heads * size * 2 * dim) + 2
    page = torch.empty((num_blocks, heads, size, 2 * dim), dtype=torch.bfloat16)
    pages = KvPages.of([page], Packing.PLAIN, kernels="triton")
    kv = any_bits(1, 2, size, heads, dim, dtype=torch.bfloat16)
    ids = torch.tensor([num_blocks - 1])
    import_blocks(pages, kv, slot_mapping(ids, size, num_tokens=size))
    assert torch.equal(bits(page[-1, :, :, :dim]), bits(kv[0, 0].transpose(0, 1)))
    assert torch.equal(bits(page[-1, :, :, dim:]), bits(kv[0, 1].transpose(0, 1)))
    out = torch.empty_like(kv)
    export_blocks(pages, ids, size, out)
    assert torch.equal(bits(out), bits(kv))
