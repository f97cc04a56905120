"""What the kernels refuse, and that nothing is written then."""

from __future__ import annotations

import math
import mmap
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from memos_vllm_kernels import (
    KernelInputError,
    KvPages,
    Packing,
    PageGeometry,
    RotaryTable,
    Rotation,
    UnsupportedLayout,
    export_blocks,
    import_blocks,
    slot_mapping,
    supported,
    tensor_over,
    unpin_thread,
    unpinned_thread,
)
from memos_vllm_kernels.residence import populate

PACKINGS = (Packing.PLAIN, Packing.CPU_AMX)


def pages_of(packing: Packing) -> KvPages:
    return KvPages.of([torch.zeros(4, 2, 32, 128, dtype=torch.bfloat16)] * 2, packing)


def tokens(count: int, *, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(count, 2, dim, dtype=dtype)


def halves(count: int) -> torch.Tensor:
    return torch.stack((tokens(count), tokens(count)))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("slot", [-1, 4 * 32, 1 << 40])
def test_a_slot_outside_the_pages_is_refused(packing: Packing, slot: int) -> None:
    pages = pages_of(packing)
    with pytest.raises(KernelInputError, match=f"slot {slot} is not in 0 to 127"):
        pages.import_layer(0, halves(2), torch.tensor([0, slot]))
    assert not any(page.any() for page in pages._pages)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("block", [-1, 4])
def test_a_block_outside_the_pages_is_refused(packing: Packing, block: int) -> None:
    with pytest.raises(KernelInputError, match=f"block id {block} is not in 0 to 3"):
        export_blocks(pages_of(packing), torch.tensor([0, block]), 64)


@pytest.mark.parametrize("packing", PACKINGS)
def test_more_tokens_than_the_blocks_hold_are_refused(packing: Packing) -> None:
    pages = pages_of(packing)
    with pytest.raises(KernelInputError, match="tokens 1 to 33 of 32"):
        export_blocks(pages, torch.tensor([0]), 32, token_start=1)
    with pytest.raises(KernelInputError, match="of 32"):
        export_blocks(pages, torch.tensor([0]), -1)
    with pytest.raises(KernelInputError, match="tokens 0 to 33 of 32"):
        slot_mapping(torch.tensor([0]), 32, num_tokens=33)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    "wrong",
    [
        halves(3),
        halves(2)[..., :32],
        halves(2).half(),
        torch.ones(2, 2, 2, 128, dtype=torch.bfloat16)[..., ::2],
        halves(2).transpose(2, 3).contiguous().transpose(2, 3),
        halves(2)[0],
        halves(2)[:1],
    ],
    ids=["tokens", "dim", "dtype", "stride", "transposed", "rank", "halves"],
)
def test_tokens_of_another_shape_dtype_or_stride_are_refused(
    packing: Packing, wrong: torch.Tensor
) -> None:
    pages = pages_of(packing)
    with pytest.raises(KernelInputError):
        pages.import_layer(0, wrong, torch.tensor([0, 1]))
    assert not any(page.any() for page in pages._pages)
    with pytest.raises(KernelInputError):
        pages.export_layer(0, torch.tensor([0]), token_start=30, out=wrong)
    with pytest.raises(KernelInputError):
        export_blocks(pages, torch.tensor([0]), 2, [wrong, wrong])


def test_angles_of_other_tokens_or_more_dims_than_a_head_has_are_refused() -> None:
    pages = pages_of(Packing.PLAIN)
    wide = RotaryTable.of(torch.ones(32), first_dim=16)
    for rotation in (
        Rotation(torch.arange(3), RotaryTable.of(torch.ones(8))),
        Rotation(torch.arange(2), wide),
    ):
        with pytest.raises(KernelInputError, match="angles"):
            pages.import_layer(0, halves(2), torch.tensor([0, 1]), angles=rotation.angles())
    assert not any(page.any() for page in pages._pages)


def test_slots_must_be_one_dimension_of_int64() -> None:
    pages = pages_of(Packing.PLAIN)
    for slots in (torch.tensor([0, 1], dtype=torch.int32), torch.tensor([[0], [1]])):
        with pytest.raises(KernelInputError, match="one dimension of int64"):
            pages.import_layer(0, halves(2), slots)


def test_strided_slots_are_read_as_they_are_indexed() -> None:
    for packing in PACKINGS:
        pages = pages_of(packing)
        pages.import_layer(0, halves(2), torch.tensor([0, 99, 1, 99])[::2])
        out = export_blocks(pages, torch.arange(4), 128)
        assert out[0][0].flatten(1).any(1).nonzero().flatten().tolist() == [0, 1]


def test_layers_that_do_not_match_are_refused() -> None:
    pages = pages_of(Packing.PLAIN)
    with pytest.raises(KernelInputError, match="layer 2 of 2"):
        pages.import_layer(2, halves(1), torch.tensor([0]))
    with pytest.raises(KernelInputError, match="3 layers, the pages have 2"):
        import_blocks(pages, torch.zeros(3, 2, 1, 2, 64), torch.tensor([0]))
    with pytest.raises(KernelInputError, match="no page tensors"):
        KvPages.of([], Packing.PLAIN)
    first = torch.zeros(4, 2, 32, 128)
    for other in (first[:3], first[:, :1], first.half()):
        with pytest.raises(KernelInputError, match="layer 1 is"):
            KvPages.of([first, other], Packing.PLAIN)


@pytest.mark.parametrize("packing", PACKINGS)
def test_pages_that_cannot_be_moved_exactly_are_named(packing: Packing) -> None:
    shape, dtype = (4, 2, 32, 128), torch.bfloat16
    assert supported(shape, dtype, packing) is None
    assert "shape (4, 32, 576)" in str(supported((4, 32, 576), dtype, packing))
    assert "head_dim" in str(supported((4, 2, 32, 127), dtype, packing))
    assert "torch.uint8" in str(supported(shape, torch.uint8, packing))
    for name in ("nvfp4", "fp8_ds_mla", "int8_per_token_head", "turboquant_4bit_nc"):
        assert name in str(supported(shape, torch.uint8, packing, kv_cache_dtype=name))
    with pytest.raises(UnsupportedLayout, match="more than numbers"):
        KvPages.of([torch.zeros(shape, dtype=torch.uint8)], packing, kv_cache_dtype="nvfp4")


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_fp8_moves_in_plain_pages_and_is_refused_in_packed_ones(name: str) -> None:
    raw = torch.randint(0, 256, (4, 2, 16, 128), dtype=torch.uint8)
    with pytest.raises(UnsupportedLayout, match="quantise an fp8 KV cache again"):
        KvPages.of([raw], Packing.CPU_AMX, kv_cache_dtype=name)
    pages = KvPages.of([raw], Packing.PLAIN, kv_cache_dtype=name)
    out = export_blocks(pages, torch.tensor([2]), 16)
    assert torch.equal(out[0][0], raw[2, :, :, :64].transpose(0, 1))


def test_packed_blocks_must_be_contiguous() -> None:
    token_major = torch.zeros(4, 32, 2, 128, dtype=torch.bfloat16).transpose(1, 2)
    with pytest.raises(UnsupportedLayout, match="not contiguous"):
        KvPages.of([token_major], Packing.CPU_AMX)
    with pytest.raises(UnsupportedLayout, match="not contiguous along head_dim"):
        KvPages.of([torch.zeros(4, 2, 32, 256)[..., ::2]], Packing.PLAIN)


def test_a_block_that_the_packing_op_refuses_is_unsupported() -> None:
    assert "refuses" in str(supported((4, 2, 16, 128), torch.bfloat16, Packing.CPU_AMX))
    assert "refuses" in str(supported((4, 2, 32, 48), torch.bfloat16, Packing.CPU_VEC))


def test_an_isa_of_another_vllm_is_unsupported() -> None:
    assert Packing.from_isa("vec16") is Packing.CPU_VEC16
    for isa in ("amx_fp8", "plain", ""):
        with pytest.raises(UnsupportedLayout, match="unknown"):
            Packing.from_isa(isa)


def test_a_packing_that_loses_numbers_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    from memos_vllm_kernels import cpu_packing

    def lossy(page: torch.Tensor, key: torch.Tensor, *_: object) -> None:
        page.copy_(key.flatten()[0].expand(page.shape))

    monkeypatch.setattr(cpu_packing, "pack", lossy)
    with pytest.raises(UnsupportedLayout, match="does not keep every number"):
        cpu_packing.learn(PageGeometry(1, 64, 96, torch.float32, Packing.CPU_VEC))
    monkeypatch.setattr(cpu_packing, "pack", lambda *_: None)
    with pytest.raises(UnsupportedLayout, match="leaves places unwritten"):
        cpu_packing.learn(PageGeometry(1, 64, 96, torch.float32, Packing.CPU_VEC))


def test_a_packing_without_any_regularity_still_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from memos_vllm_kernels import cpu_packing

    shuffle = torch.randperm(32 * 128, generator=torch.Generator().manual_seed(5))

    def shuffled(
        page: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, _: Packing
    ) -> None:
        places = shuffle.view(2, 32, 64)
        for token, slot in enumerate(slots.tolist()):
            block = page[slot // 32].flatten(1)
            block[:, places[0, slot % 32]] = key[token]
            block[:, places[1, slot % 32]] = value[token]

    monkeypatch.setattr(cpu_packing, "pack", shuffled)
    cpu_packing._learn.cache_clear()
    try:
        pages = KvPages.of([torch.zeros(4, 2, 32, 128, dtype=torch.float16)], Packing.CPU_VEC)
        kv = torch.randn(1, 2, 70, 2, 64).half()
        import_blocks(pages, kv, slot_mapping(torch.tensor([3, 0, 1]), 32, num_tokens=70))
        assert torch.equal(export_blocks(pages, torch.tensor([3, 0, 1]), 70), kv)
    finally:
        cpu_packing._learn.cache_clear()


def test_numbers_move_together_only_where_they_stay_adjacent_and_aligned() -> None:
    from memos_vllm_kernels.cpu_packing import _gather

    for offsets, unit_bytes, index in (
        ([4, 5, 6, 7, 0, 1, 2, 3], 8, [1, 0]),
        ([2, 3, 6, 7], 4, [1, 3]),
        ([0, 1, 3, 4], 2, [0, 1, 3, 4]),
        ([1, 2, 5, 6], 2, [1, 2, 5, 6]),
        ([1, 0, 3, 2], 2, [1, 0, 3, 2]),
        ([0, 1, 2], 2, [0, 1, 2]),
    ):
        gather = _gather(torch.tensor(offsets), 2)
        assert (gather.unit_bytes, gather.index.tolist()) == (unit_bytes, index)


def test_tokens_are_imported_straight_from_a_read_only_mapping(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    kv = torch.randn(2, 2, 40, 2, 64).bfloat16()
    path.write_bytes(b"headers!" + kv.view(torch.int16).numpy().tobytes())
    pages = pages_of(Packing.CPU_AMX)
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        over = tensor_over(mapped, torch.bfloat16, kv.shape, offset_bytes=8)
        import_blocks(pages, over, slot_mapping(torch.tensor([1, 2]), 32, num_tokens=40))
    with pytest.raises(BufferError):
        mapped.close()
    assert torch.equal(over, kv)
    del over
    mapped.close()


def test_a_tensor_cannot_reach_past_its_buffer() -> None:
    data = bytes(range(16))
    assert tensor_over(data, torch.uint8, (4,), offset_bytes=12).tolist() == [12, 13, 14, 15]
    assert tensor_over(data, torch.int16, (0, 4)).shape == (0, 4)
    assert tensor_over(np.zeros((0, 4)), torch.int16, (0, 4)).numel() == 0
    for dtype, shape, offset_bytes in (
        (torch.uint8, (5,), 12),
        (torch.int16, (8,), 1),
        (torch.int16, (1,), -2),
        (torch.int16, (-1, -4), 0),
    ):
        with pytest.raises(KernelInputError):
            tensor_over(data, dtype, shape, offset_bytes=offset_bytes)


def test_importing_the_package_loads_neither_vllm_nor_triton() -> None:
    code = (
        "import sys, memos_vllm_kernels;"
        "sys.exit(any(m.split('.')[0] in ('vllm', 'triton') for m in sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' madvise")
def test_the_first_blocks_are_backed_with_memory_and_no_byte_changes() -> None:
    shape = (64, 2, 64, 2 * 64)
    size = 2 * math.prod(shape)
    # Fresh from the system: an allocator may give memory that somebody has touched.
    mappings = [mmap.mmap(-1, size) for _ in range(4)]
    pages = [tensor_over(mapping, torch.bfloat16, shape) for mapping in mappings]
    pages[0].fill_(3.0)
    kv = KvPages.of(pages, Packing.PLAIN)
    before = [_resident_bytes(page) for page in pages]
    assert before == [size, 0, 0, 0]
    assert kv.populate(32)
    assert [_resident_bytes(page) for page in pages] == [size, size // 2, size // 2, size // 2]
    assert torch.equal(pages[0], torch.full_like(pages[0], 3.0))
    assert kv.populate(10_000)
    assert kv.populate(0)


def test_memory_of_a_device_is_not_ours_to_back() -> None:
    assert populate(torch.empty((4, 4), device="meta"))
    assert not populate(torch.empty((4, 8))[:, ::2])


def _resident_bytes(tensor: torch.Tensor) -> int:
    """How much of a tensor's memory is backed, by the kernel's own map of its pages."""
    first, count = tensor.data_ptr() // mmap.PAGESIZE, tensor.nbytes // mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(8 * first)
        entries = torch.frombuffer(bytearray(pagemap.read(8 * count)), dtype=torch.int64)
    # The top bit says that the page is there.
    return int((entries < 0).sum()) * mmap.PAGESIZE


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux' thread affinity")
def test_a_background_thread_leaves_its_parents_core_and_changes_nothing_else() -> None:
    seen: dict[str, object] = {}
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()

    def background() -> None:
        with unpinned_thread(num_threads=1):
            seen["inside"] = (os.sched_getaffinity(0), torch.get_num_threads())
            newcomer = threading.Thread(
                target=lambda: seen.__setitem__("newcomer", torch.get_num_threads())
            )
            newcomer.start()
            newcomer.join()
        seen["after"] = (os.sched_getaffinity(0), torch.get_num_threads())

    pinned = {min(cores)}
    holder_ready, holder_done = threading.Event(), threading.Event()
    # Stands for vLLM's other OpenMP threads, which are pinned to the other cores.
    holder = threading.Thread(target=lambda: (holder_ready.set(), holder_done.wait()))
    holder.start()
    holder_ready.wait()
    try:
        os.sched_setaffinity(0, pinned)
        worker = threading.Thread(target=background)
        worker.start()
        worker.join()
        assert os.sched_getaffinity(0) == pinned
    finally:
        os.sched_setaffinity(0, cores)
        holder_done.set()
        holder.join()
    assert seen["inside"] == (cores, 1)
    assert seen["newcomer"] == threads
    assert seen["after"] == (pinned, threads)
    assert torch.get_num_threads() == threads


def test_threads_that_begin_together_leave_the_default_of_others_as_it_was() -> None:
    threads = torch.get_num_threads()
    for _ in range(20):
        together = threading.Barrier(4)

        def begin(together: threading.Barrier = together) -> None:
            together.wait()
            unpin_thread()

        started = [threading.Thread(target=begin) for _ in range(4)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    with ThreadPoolExecutor(1) as newcomer:
        assert newcomer.submit(torch.get_num_threads).result() == threads
