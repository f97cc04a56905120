"""Pages and canonical KV, compared bit for bit over packings, dtypes and odd sizes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from bit_patterns import any_bits, bits
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_vllm_kernels import (
    KernelInputError,
    KvPages,
    Packing,
    export_blocks,
    import_blocks,
    slot_mapping,
    supported,
)
from memos_vllm_kernels.reference import export_slow, import_slow
from memos_vllm_kernels.rotary import RotaryTable, Rotation, rotate_keys

PACKINGS = (Packing.PLAIN, Packing.CPU_AMX, Packing.CPU_VEC, Packing.CPU_VEC16)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUM_BLOCKS = 7


@pytest.fixture(autouse=True)
def _one_intra_op_thread() -> Iterator[None]:
    """Two OpenMP threads on a busy machine wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_pages(
    packing: Packing,
    dtype: torch.dtype,
    *,
    heads: int = 2,
    block_size: int = 32,
    head_dim: int = 64,
    layers: int = 1,
) -> tuple[KvPages, list[torch.Tensor]]:
    """Pages full of arbitrary bits, so that a place that should not change can be seen to."""
    shape = (NUM_BLOCKS, heads, block_size, 2 * head_dim)
    tensors = [any_bits(*shape, dtype=dtype, seed=100 + layer) for layer in range(layers)]
    return KvPages.of(tensors, packing), tensors


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_export_after_import_is_the_identity_and_neighbours_stay(
    packing: Packing, dtype: torch.dtype, head_dim: int, block_size: int
) -> None:
    for heads in (1, 3, 8):
        pages, (page,) = make_pages(
            packing, dtype, heads=heads, block_size=block_size, head_dim=head_dim
        )
        before = page.clone()
        block_ids = torch.tensor([5, 0, 3])
        for num_tokens in (1, block_size - 1, block_size, 3 * block_size - 1):
            kv = any_bits(1, 2, num_tokens, heads, head_dim, dtype=dtype, seed=num_tokens)
            slots = slot_mapping(block_ids, block_size, num_tokens=num_tokens)
            import_blocks(pages, kv, slots)
            out = poisoned(1, 2, num_tokens, heads, head_dim, dtype=dtype)
            export_blocks(pages, block_ids, num_tokens, out)
            assert torch.equal(bits(out), bits(kv))
        for untouched in (1, 2, 4, 6):
            assert torch.equal(bits(page[untouched]), bits(before[untouched]))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_import_writes_what_a_token_by_token_import_writes(
    packing: Packing, dtype: torch.dtype, head_dim: int
) -> None:
    pages, (page,) = make_pages(packing, dtype, head_dim=head_dim)
    truth = page.clone()
    slots = torch.randperm(NUM_BLOCKS * 32, generator=torch.Generator().manual_seed(1))[:77]
    kv = any_bits(2, 77, 2, head_dim, dtype=dtype)
    pages.import_layer(0, kv, slots)
    import_slow(truth, kv[0], kv[1], slots, packing)
    assert torch.equal(bits(page), bits(truth))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_export_reads_what_the_reference_finds_without_a_learned_layout(
    packing: Packing, dtype: torch.dtype, head_dim: int
) -> None:
    pages, (page,) = make_pages(packing, dtype, heads=2, head_dim=head_dim)
    block_ids = torch.tensor([6, 2])
    offsets = (0, 1, 15, 16, 31, 32, 47, 63)
    out = export_blocks(pages, block_ids, 64)
    slots = slot_mapping(block_ids, 32, num_tokens=64)[list(offsets)]
    key, value = export_slow(page, slots, packing)
    assert torch.equal(bits(out[0][0][list(offsets)]), bits(key))
    assert torch.equal(bits(out[0][1][list(offsets)]), bits(value))


@pytest.mark.parametrize("packing", PACKINGS)
def test_import_after_export_leaves_every_bit_of_the_pages(packing: Packing) -> None:
    pages, tensors = make_pages(packing, torch.bfloat16, heads=3, layers=2)
    before = [page.clone() for page in tensors]
    block_ids = torch.arange(NUM_BLOCKS).flip(0)
    num_tokens = NUM_BLOCKS * 32
    kv = export_blocks(pages, block_ids, num_tokens)
    for page in tensors:
        page.zero_()
    import_blocks(pages, kv, slot_mapping(block_ids, 32, num_tokens=num_tokens))
    for page, was in zip(tensors, before, strict=True):
        assert torch.equal(bits(page), bits(was))


@pytest.mark.parametrize("packing", PACKINGS)
def test_export_of_repeated_blocks_repeats_their_tokens(packing: Packing) -> None:
    pages, _ = make_pages(packing, torch.float32)
    out = export_blocks(pages, torch.tensor([4, 4, 1, 4]), 128)
    assert torch.equal(bits(out[0][:, :32]), bits(out[0][:, 32:64]))
    assert torch.equal(bits(out[0][:, :32]), bits(out[0][:, 96:]))
    assert not torch.equal(bits(out[0][:, :32]), bits(out[0][:, 64:96]))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_second_import_replaces_the_first(packing: Packing) -> None:
    pages, _ = make_pages(packing, torch.bfloat16)
    slots = slot_mapping(torch.tensor([2, 3]), 32, num_tokens=50)
    for seed in (1, 2):
        kv = any_bits(1, 2, 50, 2, 64, dtype=torch.bfloat16, seed=seed)
        import_blocks(pages, kv, slots)
    assert torch.equal(bits(export_blocks(pages, torch.tensor([2, 3]), 50)), bits(kv))


@pytest.mark.parametrize("packing", PACKINGS)
def test_nothing_to_move_changes_nothing(packing: Packing) -> None:
    pages, (page,) = make_pages(packing, torch.bfloat16)
    before = page.clone()
    nothing = torch.empty(0, dtype=torch.int64)
    import_blocks(pages, torch.empty(1, 2, 0, 2, 64, dtype=torch.bfloat16), nothing)
    assert export_blocks(pages, nothing, 0).shape == (1, 2, 0, 2, 64)
    assert torch.equal(bits(page), bits(before))


@settings(max_examples=60, deadline=None)
@given(
    packing=st.sampled_from(PACKINGS),
    dtype=st.sampled_from(DTYPES),
    heads=st.integers(1, 8),
    head_dim=st.sampled_from([32, 64, 80, 112]),
    block_ids=st.lists(
        st.integers(0, NUM_BLOCKS - 1), min_size=1, max_size=NUM_BLOCKS, unique=True
    ),
    data=st.data(),
)
def test_any_range_of_any_blocks_comes_back_as_it_went_in(
    *,
    packing: Packing,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    block_ids: list[int],
    data: st.DataObject,
) -> None:
    pages, _ = make_pages(packing, dtype, heads=heads, head_dim=head_dim)
    room = len(block_ids) * 32
    start = data.draw(st.integers(0, room))
    count = data.draw(st.integers(0, room - start))
    ids = torch.tensor(block_ids)
    everything = torch.arange(NUM_BLOCKS)
    before = export_blocks(pages, everything, NUM_BLOCKS * 32).clone()
    kv = any_bits(1, 2, count, heads, head_dim, dtype=dtype, seed=start)
    slots = slot_mapping(ids, 32, token_start=start, num_tokens=count)
    import_blocks(pages, kv, slots)
    out = poisoned(1, 2, count, heads, head_dim, dtype=dtype)
    export_blocks(pages, ids, count, out, token_start=start)
    assert torch.equal(bits(out), bits(kv))
    before[:, :, slots] = kv
    after = export_blocks(pages, everything, NUM_BLOCKS * 32)
    assert torch.equal(bits(after), bits(before))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_rank_moves_its_slice_of_the_heads(packing: Packing) -> None:
    pages, _ = make_pages(packing, torch.bfloat16, heads=2)
    kv = any_bits(1, 2, 60, 6, 64, dtype=torch.bfloat16)
    block_ids = torch.tensor([1, 5])
    import_blocks(pages, kv[:, :, :, 2:4], slot_mapping(block_ids, 32, num_tokens=60))
    out = any_bits(1, 2, 60, 6, 64, dtype=torch.bfloat16, seed=9)
    before = out.clone()
    export_blocks(pages, block_ids, 60, out[:, :, :, 2:4])
    before[:, :, :, 2:4] = kv[:, :, :, 2:4]
    assert torch.equal(bits(out), bits(before))


def test_plain_pages_may_have_any_block_and_head_strides() -> None:
    """vLLM's token-major GPU layout is such a view: [blocks, tokens, heads, 2 * dim] in memory."""
    memory = any_bits(NUM_BLOCKS, 16, 3, 128, dtype=torch.float16)
    pages = KvPages.of([memory.transpose(1, 2)], Packing.PLAIN)
    kv = any_bits(1, 2, 20, 3, 64, dtype=torch.float16, seed=3)
    import_blocks(pages, kv, slot_mapping(torch.tensor([6, 1]), 16, num_tokens=20))
    assert torch.equal(bits(memory[6, :, :, :64]), bits(kv[0, 0, :16]))
    assert torch.equal(bits(memory[1, :4, :, 64:]), bits(kv[0, 1, 16:]))
    assert torch.equal(bits(export_blocks(pages, torch.tensor([6, 1]), 20)), bits(kv))


def test_packed_pages_may_lie_apart() -> None:
    memory = any_bits(NUM_BLOCKS, 3, 2, 32, 128, dtype=torch.bfloat16)
    before = memory.clone()
    pages = KvPages.of([memory[:, 1]], Packing.CPU_AMX)
    kv = any_bits(1, 2, 40, 2, 64, dtype=torch.bfloat16, seed=3)
    import_blocks(pages, kv, slot_mapping(torch.tensor([6, 1]), 32, num_tokens=40))
    assert torch.equal(bits(export_blocks(pages, torch.tensor([6, 1]), 40)), bits(kv))
    assert torch.equal(bits(memory[:, ::2]), bits(before[:, ::2]))


def test_a_long_export_in_several_scratches_keeps_the_order() -> None:
    shape = (40, 8, 128, 256)
    page = any_bits(*shape, dtype=torch.bfloat16)
    pages = KvPages.of([page], Packing.CPU_AMX)
    block_ids = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    out = export_blocks(pages, block_ids, 40 * 128 - 60, token_start=30)
    for token in (0, 97, 98, 1000, 4000, 5059):
        slot = slot_mapping(block_ids, 128, token_start=30 + token, num_tokens=1)
        one = export_blocks(pages, slot // 128, 1, token_start=int(slot) % 128)
        assert torch.equal(bits(out[0][:, token]), bits(one[0][:, 0]))


def test_what_vllm_chooses_here_can_be_moved() -> None:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    for dtype in DTYPES:
        for head_dim in (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512):
            packing = Packing.from_isa(_get_attn_isa(dtype, 128, head_dim))
            assert supported((4, 2, 128, 2 * head_dim), dtype, packing) is None


@pytest.mark.parametrize("packing", [Packing.PLAIN, Packing.CPU_AMX, Packing.CPU_VEC16])
def test_keys_are_turned_on_their_way_into_any_pages(packing: Packing) -> None:
    pages = [torch.zeros(4, 2, 32, 128, dtype=torch.bfloat16) for _ in range(3)]
    kv_pages = KvPages.of(pages, packing)
    kv = torch.randn((3, 2, 50, 2, 64), generator=torch.Generator().manual_seed(8)).bfloat16()
    ids = torch.tensor([3, 1])
    slots = slot_mapping(ids, 32, num_tokens=50)
    deltas = torch.arange(50) * 11 - 200
    table = RotaryTable.of(10_000.0 ** -(torch.arange(0, 64, 2) / 64))
    import_blocks(kv_pages, kv, slots, rotation=Rotation(deltas, table))
    found = export_blocks(kv_pages, ids, 50)
    for layer, (key, value) in zip(found, kv, strict=True):
        assert torch.equal(layer[0], rotate_keys(key, deltas, table))
        assert torch.equal(layer[1], value)
    with pytest.raises(KernelInputError, match="expected integers"):
        import_blocks(kv_pages, kv, slots, rotation=Rotation(deltas[1:], table))
