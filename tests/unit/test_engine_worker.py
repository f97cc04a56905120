"""The worker half with vLLM's own CPU pages and a real store: what a load may touch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bit_patterns import any_bits, bits
from store_samples import MAC_KEY, overwrite

from memos_vllm.activation.store import (
    ArtifactManifest,
    ArtifactReader,
    ArtifactStore,
    ArtifactUnreadable,
    PrefixIdentity,
    ShardLayout,
)
from memos_vllm.engine import worker_half
from memos_vllm.engine.transfer import LoadJob, LoadReport, SaveJob, SaveReport
from memos_vllm.engine.worker_half import RankShape, WorkerHalf
from memos_vllm_kernels import (
    Encoding,
    KvPages,
    Packing,
    UnsupportedLayout,
    import_blocks,
    slot_mapping,
)
from memos_vllm_kernels.encoding import decode, encode

NUM_BLOCKS, BLOCK, HEADS, DIM, LAYERS = 12, 32, 2, 64, 3
IDENTITY = PrefixIdentity("5c0be", "model-a", "cpu-bf16", 1)
TOKENS = tuple(range(1000, 1000 + 4 * BLOCK))
LAYOUTS = [
    (Packing.CPU_AMX, torch.bfloat16),
    (Packing.CPU_VEC, torch.bfloat16),
    (Packing.CPU_VEC, torch.float32),
    (Packing.CPU_VEC16, torch.bfloat16),
    (Packing.CPU_VEC16, torch.float16),
    (Packing.CPU_VEC16, torch.float32),
    (Packing.PLAIN, torch.bfloat16),
]
each_layout = pytest.mark.parametrize(
    ("packing", "dtype"), LAYOUTS, ids=lambda value: str(getattr(value, "value", value))
)


class Rank:
    """One worker: its pages, and its half of the connector."""

    def __init__(
        self,
        root: Path,
        *,
        packing: Packing = Packing.CPU_VEC16,
        dtype: torch.dtype = torch.bfloat16,
        heads: int = HEADS,
        block_size: int = BLOCK,
        shape: RankShape | None = None,
        seed: int = 0,
        allow_portable: bool = False,
        encoding: Encoding = Encoding.EXACT,
        bits_drawn: bool = True,
    ) -> None:
        page = (NUM_BLOCKS * BLOCK // block_size, heads, block_size, 2 * DIM)
        self.tensors = [
            any_bits(*page, dtype=dtype, seed=seed * 10 + index)
            if bits_drawn
            else torch.randn(page, generator=torch.Generator().manual_seed(index)).to(dtype)
            for index in range(LAYERS)
        ]
        self.pages = KvPages.of(self.tensors, packing)
        self.store = ArtifactStore(root / "store", mac_key=MAC_KEY)
        self.half = WorkerHalf(
            store=self.store,
            rank=shape or RankShape(0, 0),
            open_pages=lambda: self.pages,
            block_size=BLOCK,
            allow_portable=allow_portable,
            encoding=encoding,
        )

    def load(
        self,
        artifact: str,
        blocks: Sequence[int],
        *,
        first: int = 0,
        end: int = len(TOKENS),
        identity: PrefixIdentity = IDENTITY,
    ) -> LoadReport:
        job = LoadJob("r", artifact, identity, first, end - first, tuple(blocks))
        self.half.start_loads([job])
        finished, failed = self._until(self.half.finished_loads)
        report = self.half.take_report()
        assert report is not None
        (load,) = report.loads
        assert finished == {"r"}
        assert failed == ({"r"} if load.error is not None else set())
        return load

    def save(self, blocks: Sequence[int], token_ids: tuple[int, ...] = TOKENS) -> SaveReport:
        self.half.start_saves([SaveJob(7, IDENTITY, token_ids, tuple(blocks))])

        def saved() -> Sequence[SaveReport]:
            self.half.finished_loads()
            report = self.half.take_report()
            return () if report is None else report.saves

        (report,) = self._until(saved)
        assert report.save_id == 7
        return report

    def tokens_at(self, blocks: Sequence[int]) -> torch.Tensor:
        """Canonical KV of whole blocks, by the kernels' own reading of the pages."""
        from memos_vllm_kernels import export_blocks

        size = self.pages.geometry.block_size
        ids = torch.tensor(blocks)
        found = export_blocks(self.pages, ids, len(blocks) * size)
        assert isinstance(found, torch.Tensor)
        return found

    def snapshot(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.tensors]

    def assert_only_changed(self, before: list[torch.Tensor], blocks: Sequence[int]) -> None:
        untouched = [block for block in range(self.pages.num_blocks) if block not in blocks]
        for old, new in zip(before, self.tensors, strict=True):
            assert torch.equal(bits(old[untouched]), bits(new[untouched])), "a neighbour changed"

    @staticmethod
    def _until(poll: Callable[[], Sequence[object]]) -> tuple[object, ...]:  # type: ignore[type-arg]
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = poll()
            if any(found):
                return tuple(found)
            time.sleep(0.001)
        raise AssertionError("the worker did not answer")


@pytest.fixture
def new_rank(tmp_path: Path) -> Iterator[Callable[..., Rank]]:
    ranks: list[Rank] = []

    def make(**options: object) -> Rank:
        ranks.append(Rank(tmp_path, **options))  # type: ignore[arg-type]
        return ranks[-1]

    yield make
    for rank in ranks:
        rank.half.shutdown()


NewRank = Callable[..., Rank]


def commit(rank: Rank, report: SaveReport, *, heads: int = HEADS) -> ArtifactManifest:
    assert report.error is None
    assert report.shard is not None
    return rank.store.commit(
        IDENTITY, TOKENS, total_layers=LAYERS, total_kv_heads=heads, shards=[report.shard]
    )


def baked(new_rank: NewRank, **options: object) -> tuple[Rank, ArtifactManifest]:
    rank = new_rank(seed=1, **options)
    return rank, commit(rank, rank.save([7, 2, 9, 4]))


@each_layout
def test_what_is_loaded_is_what_was_saved_bit_for_bit(
    new_rank: NewRank, packing: Packing, dtype: torch.dtype
) -> None:
    saver, manifest = baked(new_rank, packing=packing, dtype=dtype)
    expected = saver.tokens_at([7, 2, 9, 4])
    loader = new_rank(packing=packing, dtype=dtype, seed=2)
    before = loader.snapshot()
    report = loader.load(manifest.key, [1, 10, 3, 6])
    assert report.error is None
    assert report.num_bytes == LAYERS * 2 * len(TOKENS) * HEADS * DIM * dtype.itemsize
    assert torch.equal(bits(loader.tokens_at([1, 10, 3, 6])), bits(expected))
    # The packed bytes too, not only what our own reading makes of them.
    for old, new in zip(saver.tensors, loader.tensors, strict=True):
        assert torch.equal(bits(old[[7, 2, 9, 4]]), bits(new[[1, 10, 3, 6]]))
    loader.assert_only_changed(before, [1, 10, 3, 6])


@each_layout
def test_a_load_that_starts_behind_resident_blocks_writes_only_the_rest(
    new_rank: NewRank, packing: Packing, dtype: torch.dtype
) -> None:
    saver, manifest = baked(new_rank, packing=packing, dtype=dtype)
    loader = new_rank(packing=packing, dtype=dtype, seed=2)
    before = loader.snapshot()
    report = loader.load(manifest.key, [8, 0], first=BLOCK, end=3 * BLOCK)
    assert report.error is None
    assert torch.equal(bits(loader.tokens_at([8, 0])), bits(saver.tokens_at([2, 9])))
    loader.assert_only_changed(before, [8, 0])


@pytest.mark.parametrize(
    ("encoding", "share"),
    [(Encoding.INT8, 0.53), (Encoding.INT4, 0.32), (Encoding.FP8, 0.53)],
    ids=lambda value: getattr(value, "value", None),
)
def test_a_smaller_artifact_comes_back_as_its_encoding_rounds_it(
    new_rank: NewRank, encoding: Encoding, share: float
) -> None:
    saver, manifest = baked(new_rank, packing=Packing.CPU_AMX, encoding=encoding, bits_drawn=False)
    assert {shard.layout.encoding for shard in manifest.shards} == {encoding.value}
    raw = LAYERS * 2 * len(TOKENS) * HEADS * DIM * 2
    assert sum(shard.layout.kv_bytes(len(TOKENS)) for shard in manifest.shards) <= share * raw

    exact = saver.tokens_at([7, 2, 9, 4]).flatten(0, 1)
    expected = torch.stack(
        [
            decode(encode(half, encoding), encoding, head_dim=DIM, dtype=torch.bfloat16)
            for half in exact
        ]
    )
    for packing in (Packing.CPU_AMX, Packing.CPU_VEC, Packing.PLAIN):
        # A loader reads what it finds, whatever it would write itself.
        loader = new_rank(packing=packing, seed=2)
        before = loader.snapshot()
        report = loader.load(manifest.key, [1, 10, 3, 6])
        assert report.error is None
        assert report.num_bytes <= share * raw
        found = loader.tokens_at([1, 10, 3, 6]).flatten(0, 1)
        assert torch.equal(bits(found), bits(expected))
        loader.assert_only_changed(before, [1, 10, 3, 6])


def test_an_encoding_that_this_version_does_not_know_is_refused(new_rank: NewRank) -> None:
    rank = new_rank(seed=1)
    layout = ShardLayout(0, LAYERS, 0, HEADS, 10, "uint8", encoding="int2")
    with rank.store.begin_shard(IDENTITY, TOKENS, layout) as writer:
        for layer in range(LAYERS):
            writer.write_layer(layer, np.zeros((2, len(TOKENS), HEADS, 10), dtype=np.uint8))
        shard = writer.finish()
    manifest = rank.store.commit(
        IDENTITY, TOKENS, total_layers=LAYERS, total_kv_heads=HEADS, shards=[shard]
    )
    before = rank.snapshot()
    report = rank.load(manifest.key, [1, 10, 3, 6])
    assert "int2" in str(report.error)
    rank.assert_only_changed(before, [])


def test_an_artifact_moves_between_instruction_sets(new_rank: NewRank) -> None:
    saver, manifest = baked(new_rank, packing=Packing.CPU_AMX)
    for packing in (Packing.CPU_VEC, Packing.CPU_VEC16, Packing.PLAIN):
        loader = new_rank(packing=packing, seed=2)
        assert loader.load(manifest.key, [1, 10, 3, 6]).error is None
        found = loader.tokens_at([1, 10, 3, 6])
        assert torch.equal(bits(found), bits(saver.tokens_at([7, 2, 9, 4])))


def test_blocks_that_vllm_splits_for_its_kernel_are_saved_and_loaded_whole(
    new_rank: NewRank,
) -> None:
    saver = new_rank(packing=Packing.PLAIN, block_size=16, seed=1)
    manifest = commit(saver, saver.save([3, 1, 5, 0]))
    loader = new_rank(packing=Packing.PLAIN, block_size=16, seed=2)
    before = loader.snapshot()
    assert loader.load(manifest.key, [2, 4, 0, 1]).error is None
    split = [4, 5, 8, 9, 0, 1, 2, 3]
    assert torch.equal(
        bits(loader.tokens_at(split)), bits(saver.tokens_at([6, 7, 2, 3, 10, 11, 0, 1]))
    )
    loader.assert_only_changed(before, split)


def test_ranks_save_and_load_their_own_heads(new_rank: NewRank) -> None:
    shapes = [RankShape(0, 0), RankShape(0, 1)]
    savers = [new_rank(heads=1, shape=shape, seed=1 + i) for i, shape in enumerate(shapes)]
    reports = [saver.save([7, 2, 9, 4]) for saver in savers]
    shards = [report.shard for report in reports if report.shard is not None]
    manifest = savers[0].store.commit(
        IDENTITY, TOKENS, total_layers=LAYERS, total_kv_heads=2, shards=shards
    )
    for saver, shape in zip(savers, shapes, strict=True):
        loader = new_rank(heads=1, shape=shape, seed=5)
        assert loader.load(manifest.key, [1, 10, 3, 6]).error is None
        assert torch.equal(
            bits(loader.tokens_at([1, 10, 3, 6])), bits(saver.tokens_at([7, 2, 9, 4]))
        )
    # And one rank that has all heads loads what two have saved.
    whole = new_rank(seed=6)
    assert whole.load(manifest.key, [1, 10, 3, 6]).error is None
    both = torch.cat([saver.tokens_at([7, 2, 9, 4]) for saver in savers], dim=3)
    assert torch.equal(bits(whole.tokens_at([1, 10, 3, 6])), bits(both))


def test_a_rank_that_only_replicates_heads_saves_nothing(new_rank: NewRank) -> None:
    rank = new_rank(shape=RankShape(0, 0, saves=False))
    rank.half.start_saves([SaveJob(7, IDENTITY, TOKENS, (1, 2, 3, 4))])
    rank.half._saver.submit(int).result()
    rank.half.finished_loads()
    assert rank.half.take_report() is None


def test_pages_are_opened_and_backed_before_the_first_job(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    before = rank.snapshot()
    opened: list[str] = []

    def open_pages() -> KvPages:
        opened.append(threading.current_thread().name)
        return rank.pages

    rank.half._open_pages = open_pages
    rank.half.prepare(num_blocks=5)
    rank.half._loader.submit(int).result()
    rank.half._saver.submit(int).result()
    assert len(opened) == 1
    assert opened[0].startswith("memos-load")
    rank.assert_only_changed(before, [])
    assert rank.save([1, 2, 3, 4]).error is None
    assert len(opened) == 1
    rank.half.shutdown()


def test_pages_that_cannot_be_opened_yet_are_opened_by_the_first_job(tmp_path: Path) -> None:
    rank = Rank(tmp_path)

    def too_early() -> KvPages:
        raise AttributeError("isa")

    rank.half._open_pages = too_early
    rank.half.prepare(num_blocks=5)
    rank.half._loader.submit(int).result()
    rank.half._open_pages = lambda: rank.pages
    assert rank.save([1, 2, 3, 4]).error is None
    rank.half.shutdown()


def test_an_empty_step_waits_for_what_is_under_way_and_for_nothing_else(
    new_rank: NewRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_half, "_EMPTY_STEP_SECONDS", 60.0)
    rank = new_rank()
    rank.half.wait_for_progress()
    rank.half.start_saves([SaveJob(7, IDENTITY, TOKENS, (1, 2, 3, 4))])
    rank.half.wait_for_progress()
    # It came back because the save has ended, and comes back at once until that is reported.
    rank.half.wait_for_progress()
    rank.half.finished_loads()
    report = rank.half.take_report()
    assert report is not None
    assert [save.error for save in report.saves] == [None]
    rank.half.wait_for_progress()


# --- what can be wrong with an artifact -----------------------------------------------------

_Damage = Callable[[Path, ArtifactManifest], None]


def _flip_a_byte_of_kv(root: Path, manifest: ArtifactManifest) -> None:
    shard = root / "store" / manifest.shards[0].file_name
    overwrite(shard, shard.stat().st_size // 2)


def _flip_a_byte_of_the_last_layer(root: Path, manifest: ArtifactManifest) -> None:
    shard = root / "store" / manifest.shards[0].file_name
    layer = 2 * len(TOKENS) * HEADS * DIM * 2
    overwrite(shard, 4096 + LAYERS * layer - layer // 2)


def _truncate(root: Path, manifest: ArtifactManifest) -> None:
    shard = root / "store" / manifest.shards[0].file_name
    shard.chmod(0o600)
    shard.write_bytes(shard.read_bytes()[:-5000])


def _empty(root: Path, manifest: ArtifactManifest) -> None:
    shard = root / "store" / manifest.shards[0].file_name
    shard.chmod(0o600)
    shard.write_bytes(b"")


def _delete_the_shard(root: Path, manifest: ArtifactManifest) -> None:
    (root / "store" / manifest.shards[0].file_name).unlink()


def _delete_the_manifest(root: Path, manifest: ArtifactManifest) -> None:
    (root / "store" / "manifests" / f"{manifest.key}.json").unlink()


def _alter_the_manifest(root: Path, manifest: ArtifactManifest) -> None:
    path = root / "store" / "manifests" / f"{manifest.key}.json"
    data = path.read_bytes().replace(b"model-a", b"model-b")
    path.chmod(0o600)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        _flip_a_byte_of_kv,
        _flip_a_byte_of_the_last_layer,
        _truncate,
        _empty,
        _delete_the_shard,
        _delete_the_manifest,
        _alter_the_manifest,
    ],
)
def test_a_damaged_artifact_is_reported_and_neighbours_stay(
    new_rank: NewRank, tmp_path: Path, damage: _Damage
) -> None:
    _, manifest = baked(new_rank)
    damage(tmp_path, manifest)
    loader = new_rank(seed=2)
    before = loader.snapshot()
    report = loader.load(manifest.key, [1, 10, 3, 6])
    assert report.error
    assert report.unusable
    assert report.num_bytes == 0
    loader.assert_only_changed(before, [1, 10, 3, 6])


@pytest.mark.parametrize(
    "wanted",
    [
        replace(IDENTITY, fingerprint="model-b"),
        replace(IDENTITY, scope="0ther"),
        replace(IDENTITY, renderer_version=2),
        replace(IDENTITY, numerics="cpu-fp32"),
    ],
    ids=["another model", "another cube", "another renderer", "other numerics"],
)
def test_an_artifact_of_something_else_is_never_loaded(
    new_rank: NewRank, wanted: PrefixIdentity
) -> None:
    _, manifest = baked(new_rank)
    loader = new_rank(seed=2)
    before = loader.snapshot()
    assert loader.load(manifest.key, [1, 10, 3, 6], identity=wanted).error
    loader.assert_only_changed(before, [])


def test_other_numerics_are_loaded_when_the_operator_allows_it(new_rank: NewRank) -> None:
    _, manifest = baked(new_rank)
    loader = new_rank(seed=2, allow_portable=True)
    wanted = replace(IDENTITY, numerics="cpu-fp32")
    assert loader.load(manifest.key, [1, 10, 3, 6], identity=wanted).error is None
    wanted = replace(wanted, fingerprint="model-b")
    assert loader.load(manifest.key, [1, 10, 3, 6], identity=wanted).error


@pytest.mark.parametrize("artifact", ["", "x", "../../etc/passwd", "0" * 64])
def test_a_load_of_nothing_is_reported(new_rank: NewRank, artifact: str) -> None:
    rank = new_rank()
    before = rank.snapshot()
    assert rank.load(artifact, [1, 10, 3, 6]).error
    rank.assert_only_changed(before, [])


def test_an_artifact_shorter_than_planned_is_reported_before_a_page_is_written(
    new_rank: NewRank,
) -> None:
    _, manifest = baked(new_rank)
    loader = new_rank(seed=2)
    before = loader.snapshot()
    report = loader.load(manifest.key, [1, 10, 3, 6, 0], end=len(TOKENS) + BLOCK)
    assert report.error
    loader.assert_only_changed(before, [])


@pytest.mark.parametrize("blocks", [[1, 2, 3], [1, 2, 3, NUM_BLOCKS], [1, 2, 3, -1]])
def test_blocks_that_cannot_hold_the_tokens_are_reported_and_nothing_is_written(
    new_rank: NewRank, blocks: list[int]
) -> None:
    _, manifest = baked(new_rank)
    loader = new_rank(seed=2)
    before = loader.snapshot()
    report = loader.load(manifest.key, blocks)
    assert report.error
    assert not report.unusable
    loader.assert_only_changed(before, [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kv_of_another_dtype_is_never_loaded_even_where_numerics_may_differ(
    new_rank: NewRank, dtype: torch.dtype
) -> None:
    """float16 is as wide as bfloat16, so the bytes would fit."""
    _, manifest = baked(new_rank)
    loader = new_rank(dtype=dtype, seed=2, allow_portable=True)
    before = loader.snapshot()
    assert loader.load(manifest.key, [1, 10, 3, 6]).error
    loader.assert_only_changed(before, [])


def test_pages_that_cannot_be_moved_fail_each_job_and_no_thread(tmp_path: Path) -> None:
    def refuse() -> KvPages:
        raise UnsupportedLayout("a layer keeps more than one tensor")

    rank = Rank(tmp_path)
    rank.half._open_pages = refuse
    assert "more than one tensor" in str(rank.load("0" * 64, [1, 2, 3, 4]).error)
    assert "more than one tensor" in str(rank.save([1, 2, 3, 4]).error)
    assert "more than one tensor" in str(rank.load("0" * 64, [1, 2, 3, 4]).error)
    rank.half.shutdown()


def test_after_a_failed_load_the_next_one_works(new_rank: NewRank) -> None:
    saver, manifest = baked(new_rank)
    loader = new_rank(seed=2)
    assert loader.load("0" * 64, [1, 10, 3, 6]).error
    assert loader.load(manifest.key, [1, 10, 3, 6]).error is None
    assert torch.equal(bits(loader.tokens_at([1, 10, 3, 6])), bits(saver.tokens_at([7, 2, 9, 4])))


def test_a_load_does_not_wait_for_a_thread_that_has_not_begun_to_verify(new_rank: NewRank) -> None:
    saver, manifest = baked(new_rank)
    loader = new_rank(seed=2)
    begun, over = threading.Event(), threading.Event()

    def busy() -> None:
        begun.set()
        over.wait(20)

    other = loader.half._verifier.submit(busy)
    try:
        assert begun.wait(20)
        assert loader.load(manifest.key, [1, 10, 3, 6]).error is None
        assert not other.done()
    finally:
        over.set()
    assert torch.equal(bits(loader.tokens_at([1, 10, 3, 6])), bits(saver.tokens_at([7, 2, 9, 4])))


def test_memory_stays_until_a_verification_under_way_is_over(
    new_rank: NewRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, manifest = baked(new_rank)
    loader = new_rank(seed=2)
    begun, running = threading.Event(), set[int]()

    def slow(self: ArtifactReader, layer: int, *, num_tokens: int) -> None:
        running.add(layer)
        begun.set()
        time.sleep(0.2)
        running.remove(layer)

    def failing(self: ArtifactReader, layer: int, *, num_tokens: int) -> None:
        assert begun.wait(20)
        raise ArtifactUnreadable(manifest.key, "no memory")

    monkeypatch.setattr(ArtifactReader, "verify_layer", slow)
    monkeypatch.setattr(ArtifactReader, "layer", failing)
    report = loader.load(manifest.key, [1, 10, 3, 6])
    assert "no memory" in str(report.error)
    assert not report.unusable
    assert not running


def test_a_save_that_fails_is_reported_and_leaves_no_file(
    new_rank: NewRank, tmp_path: Path
) -> None:
    rank = new_rank()
    report = rank.save([1, 2, 3])
    assert report.shard is None
    assert report.error
    assert not list((tmp_path / "store" / "tmp").iterdir())
    assert not list((tmp_path / "store" / "data").rglob("*.safetensors"))


def test_many_jobs_are_each_answered_once(new_rank: NewRank) -> None:
    _, manifest = baked(new_rank)
    rank = new_rank(seed=2)
    jobs = [
        LoadJob(f"r{i}", manifest.key if i % 3 else "0" * 64, IDENTITY, 0, 4 * BLOCK, (1, 2, 3, 4))
        for i in range(30)
    ]
    rank.half.start_loads(jobs)
    finished: list[str] = []
    failed: set[str] = set()
    deadline = time.monotonic() + 20
    while len(finished) < 30 and time.monotonic() < deadline:
        done, bad = rank.half.finished_loads()
        finished += done
        failed |= bad
    assert sorted(finished) == sorted(job.request_id for job in jobs)
    assert failed == {f"r{i}" for i in range(0, 30, 3)}
    report = rank.half.take_report()
    assert report is not None
    assert len(report.loads) == 30
    assert rank.half.take_report() is None


def test_the_pages_that_vllm_writes_are_the_pages_that_are_saved(new_rank: NewRank) -> None:
    """Tokens packed by vLLM's own op, saved, loaded elsewhere: read back as they were given."""
    rank = new_rank(packing=Packing.CPU_AMX)
    given = any_bits(LAYERS, 2, len(TOKENS), HEADS, DIM, dtype=torch.bfloat16, seed=9)
    blocks = torch.tensor([7, 2, 9, 4])
    import_blocks(rank.pages, given, slot_mapping(blocks, BLOCK, num_tokens=len(TOKENS)))
    manifest = commit(rank, rank.save([7, 2, 9, 4]))
    loader = new_rank(packing=Packing.CPU_VEC16, seed=3)
    assert loader.load(manifest.key, [0, 1, 2, 3]).error is None
    assert torch.equal(bits(loader.tokens_at([0, 1, 2, 3])), bits(given))
