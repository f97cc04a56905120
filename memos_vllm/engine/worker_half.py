"""The half of the connector that runs in each worker and moves KV.

Loads and saves run in background threads. A page that a load writes belongs to a request that
waits for it; a page that a save reads is complete and referenced. So neither races with the
model, and the model never waits for either.

On a GPU a load is reported when all of it is verified and on its way: the model then waits for each
layer where it needs it. One layer ahead, because vLLM writes a layer's new KV before it says that
it reads the layer, and a page may by then be another request's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memos_vllm.activation.fingerprint import same_kv_scale
from memos_vllm.activation.store import (
    ArtifactManifest,
    ArtifactReader,
    ArtifactStore,
    ArtifactUnreadable,
    ShardEntry,
    ShardLayout,
)
from memos_vllm.engine.transfer import (
    LoadJob,
    LoadReport,
    SaveJob,
    SaveReport,
    StepReport,
)
from memos_vllm.errors import ArtifactError, ArtifactMissing, FingerprintMismatch
from memos_vllm_kernels import (
    Encoding,
    KernelInputError,
    KvPages,
    PageMover,
    slot_mapping,
    unpin_thread,
)

logger = logging.getLogger(__name__)

# How long a step that computes nothing waits for a load or a save to end. Such steps follow one
# another as fast as they can, in two processes: without a pause they take the cores that the work
# which they wait for needs. A request that comes in between waits as long.
_EMPTY_STEP_SECONDS = 0.02
# What is backed with memory ahead: enough for the loads soon after a start, and little enough for
# a machine whose pool is larger than the memory that is free.
_MAX_BACKED_BYTES = 1 << 30
# Saving yields the cores to the model: lowest priority but one.
_SAVER_NICENESS = 15


@dataclass(frozen=True, slots=True)
class RankShape:
    """Which part of the model's KV this rank holds.

    Attributes:
        layer_start: index of the first of this rank's attention layers in the whole model.
        head_start: index of the first of this rank's KV heads.
        saves: False on ranks whose heads are replicas of another rank's.
    """

    layer_start: int
    head_start: int
    saves: bool = True


class WorkerHalf:
    """Imports and exports this rank's pages.

    Args:
        store: opened for reading; saves write shards, the scheduler half commits them.
        rank: this rank's part of the model.
        open_pages: makes the page view; called once, at the first job, when vLLM has chosen
            its attention kernels.
        encoding: how saves write KV; a load reads what it finds.
        move: makes the mover of the pages.
    """

    def __init__(
        self,
        *,
        store: ArtifactStore,
        rank: RankShape,
        open_pages: Callable[[], KvPages],
        block_size: int,
        allow_portable: bool = False,
        encoding: Encoding = Encoding.EXACT,
        move: Callable[[KvPages], PageMover] = PageMover,
    ) -> None:
        self._store = store
        self._rank = rank
        self._open_pages = open_pages
        self._block_size = block_size
        self._allow_portable = allow_portable
        self._encoding = encoding
        self._move = move
        self._loads_by: PageMover | None = None
        self._saves_by: PageMover | None = None
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._under_way = 0
        self._loads_done: list[LoadReport] = []
        self._saves_done: list[SaveReport] = []
        self._report = StepReport()
        self._loader = ThreadPoolExecutor(1, "memos-load", initializer=unpin_thread)
        self._verifier = ThreadPoolExecutor(1, "memos-verify", initializer=unpin_thread)
        self._saver = ThreadPoolExecutor(1, "memos-save", initializer=_start_saver)

    def prepare(self, *, num_blocks: int) -> None:
        """Do now, in the background, what the first load would have to wait for.

        Args:
            num_blocks: how many blocks to back with memory; vLLM gives out the first ones first.
        """
        self._loader.submit(self._prepare_pages, num_blocks)

    def _prepare_pages(self, num_blocks: int) -> None:
        try:
            pages = self._movers()[0].pages
        except (AttributeError, KernelInputError, RuntimeError) as error:
            # The first job meets it again, and reports it.
            logger.debug("memos: the pages cannot be opened yet: %s", error)
            return
        self._saver.submit(pages.warm_up, self._encoding)
        geometry = pages.geometry
        block_bytes = geometry.token_bytes * self._block_size * pages.num_layers
        # In the kernel's blocks, into which vLLM may split its own.
        ratio = self._block_size // geometry.block_size
        self._saver.submit(
            pages.populate, min(num_blocks, _MAX_BACKED_BYTES // block_bytes) * ratio
        )

    def start_loads(self, jobs: Sequence[LoadJob]) -> None:
        """Queue loads into pages that the steps so far may still read; returns at once."""
        for job in jobs:
            self._submit(self._loader, self._load, job, self._mark())

    def start_saves(self, jobs: Sequence[SaveJob]) -> None:
        """Queue saves of KV that the steps so far have computed; returns at once."""
        for job in jobs if self._rank.saves else ():
            self._submit(self._saver, self._save, job, self._mark())

    def begin_step(self, *, layer_by_layer: bool) -> None:
        """Before a step computes: let it wait for the first layer of the loads reported so far.

        Args:
            layer_by_layer: `wait_for_layer` will be called; else it waits for all layers now.
        """
        if self._loads_by is None:
            return
        if layer_by_layer:
            self._loads_by.wait_for_layer(0)
        else:
            self._loads_by.wait_for_layers()

    def wait_for_layer(self, index: int) -> None:
        """Let this rank's layer `index`, which follows now, and the next one find their KV."""
        if self._loads_by is not None:
            self._loads_by.wait_for_layer(index + 1)

    def wait_for_progress(self) -> None:
        """Give way to the loads and saves under way, in a step that computes nothing."""
        with self._ended:
            if self._under_way and not self._loads_done and not self._saves_done:
                self._ended.wait(_EMPTY_STEP_SECONDS)

    def finished_loads(self) -> tuple[set[str], set[str]]:
        """Request ids whose load ended since the last call, and those of them that failed."""
        with self._lock:
            loads, self._loads_done = self._loads_done, []
            saves, self._saves_done = self._saves_done, []
        self._report.loads += loads
        self._report.saves += saves
        return (
            {report.request_id for report in loads},
            {report.request_id for report in loads if report.error is not None},
        )

    def take_report(self) -> StepReport | None:
        """What ended since the last call, or None."""
        report, self._report = self._report, StepReport()
        return report if report.loads or report.saves else None

    def shutdown(self) -> None:
        """End the threads; a save that has not started is dropped, one under way ends."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._verifier.shutdown(wait=True, cancel_futures=True)
        self._saver.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self, executor: ThreadPoolExecutor, work: Callable[[Any, Any], None], job: Any, mark: Any
    ) -> None:
        with self._lock:
            self._under_way += 1
        executor.submit(work, job, mark)

    def _mark(self) -> Any:
        """What the model has been given to compute so far, for the movers to come after."""
        return None if self._loads_by is None else self._loads_by.mark()

    # --- loading ------------------------------------------------------------------------

    def _load(self, job: LoadJob, mark: Any) -> None:
        started = time.perf_counter()
        num_bytes, error, unusable = 0, None, False
        try:
            num_bytes = self._import(job, mark)
        except (ArtifactUnreadable, KernelInputError, OSError, RuntimeError) as failure:
            error = str(failure)
        except ArtifactError as failure:
            error, unusable = str(failure), True
        except Exception as failure:
            logger.exception("memos: loading artifact %s failed", job.artifact)
            error = repr(failure)
        report = LoadReport(
            job.request_id,
            job.artifact,
            num_bytes,
            time.perf_counter() - started,
            error=error,
            unusable=unusable,
        )
        with self._ended:
            self._under_way -= 1
            self._loads_done.append(report)
            self._ended.notify()

    def _import(self, job: LoadJob, mark: Any) -> int:
        """Verify and copy; returns the bytes copied. Raises when anything is wrong."""
        if not job.artifact:
            raise ArtifactMissing("(unknown)", "it was evicted before the load began")
        mover = self._movers()[0]
        pages, geometry = mover.pages, mover.pages.geometry
        manifest = self._store.read_manifest(job.artifact)
        encoding = self._check(manifest, job, pages)
        first, end = job.first_token, job.first_token + job.num_tokens
        slots = slot_mapping(
            torch.tensor(job.block_ids, dtype=torch.int64),
            self._block_size,
            num_tokens=job.num_tokens,
        )
        rank, dtype = self._rank, pages.row_dtype(encoding)
        layers = range(rank.layer_start, rank.layer_start + pages.num_layers)
        heads = range(rank.head_start, rank.head_start + geometry.num_kv_heads)
        num_bytes = 0
        with (
            self._store.open_shards(manifest, layers=layers, heads=heads) as reader,
            _verified_ahead(self._verifier, reader, num_tokens=end) as verified,
        ):
            for index, layer in enumerate(layers):
                verified(layer)
                kv = _as_tensor(reader.layer(layer, num_tokens=end), dtype)[:, first:]
                mover.import_layer(index, kv, slots, encoding=encoding, after=mark)
                num_bytes += kv.numel() * dtype.itemsize
        return num_bytes

    def _check(self, manifest: ArtifactManifest, job: LoadJob, pages: KvPages) -> Encoding:
        """How the artifact is written. Raises when it is not what these pages can take."""
        found, expected = manifest.identity, job.identity
        if (found.scope, found.fingerprint, found.renderer_version) != (
            expected.scope,
            expected.fingerprint,
            expected.renderer_version,
        ):
            raise FingerprintMismatch(
                manifest.key,
                expected=f"model {expected.fingerprint[:16]}",
                found=f"model {found.fingerprint[:16]}",
            )
        if found.numerics != expected.numerics and not self._allow_portable:
            raise FingerprintMismatch(
                manifest.key, expected=expected.numerics, found=found.numerics
            )
        if not same_kv_scale(found.numerics, expected.numerics):
            raise FingerprintMismatch(
                manifest.key, expected=expected.numerics, found=found.numerics
            )
        encoding = _encoding_of(manifest)
        width = pages.layer_shape(0, encoding)[-1]
        dtype = str(pages.row_dtype(encoding)).removeprefix("torch.")
        for shard in manifest.shards:
            # As wide, bfloat16 would pass for float16, and mean other numbers.
            if (shard.layout.dtype, shard.layout.head_dim) != (dtype, width):
                raise FingerprintMismatch(
                    manifest.key,
                    expected=f"{width} {dtype} a head",
                    found=f"{shard.layout.head_dim} {shard.layout.dtype}",
                )
        if manifest.num_tokens < job.first_token + job.num_tokens:
            raise ArtifactUnreadable(manifest.key, "it holds fewer tokens than were planned")
        return encoding

    # --- saving -------------------------------------------------------------------------

    def _save(self, job: SaveJob, mark: Any) -> None:
        started = time.perf_counter()
        shard, error = None, None
        try:
            shard = self._export(job, mark)
        except (ArtifactError, KernelInputError, OSError, RuntimeError) as failure:
            error = str(failure)
        except Exception as failure:
            logger.exception("memos: saving a prefix failed")
            error = repr(failure)
        report = SaveReport(job.save_id, shard, time.perf_counter() - started, error=error)
        with self._ended:
            self._under_way -= 1
            self._saves_done.append(report)
            self._ended.notify()

    def _export(self, job: SaveJob, mark: Any) -> ShardEntry:
        mover, encoding = self._movers()[1], self._encoding
        pages, geometry = mover.pages, mover.pages.geometry
        shape = pages.layer_shape(len(job.token_ids), encoding)
        staging = torch.empty(shape, dtype=pages.row_dtype(encoding))
        layout = ShardLayout(
            layer_start=self._rank.layer_start,
            num_layers=pages.num_layers,
            head_start=self._rank.head_start,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=shape[-1],
            dtype=str(staging.dtype).removeprefix("torch."),
            encoding=encoding.value,
        )
        blocks = _kernel_blocks(job.block_ids, self._block_size, geometry.block_size)
        with self._store.begin_shard(job.identity, job.token_ids, layout) as writer:
            for index in range(pages.num_layers):
                mover.export_layer(index, blocks, out=staging, encoding=encoding, after=mark)
                writer.write_layer(layout.layer_start + index, _as_array(staging))
            return writer.finish()

    def _movers(self) -> tuple[PageMover, PageMover]:
        """For loads and for saves, each with a stream of its own."""
        with self._lock:
            if self._loads_by is None or self._saves_by is None:
                pages = self._open_pages()
                self._loads_by, self._saves_by = self._move(pages), self._move(pages)
            return self._loads_by, self._saves_by


@contextlib.contextmanager
def _verified_ahead(
    verifier: Executor, reader: ArtifactReader, *, num_tokens: int
) -> Iterator[Callable[[int], None]]:
    """Verify layers in another thread while those before them are copied.

    Yields:
        To be called with a layer before it is read: waits for the other thread where that has
        begun with it. Otherwise the reader verifies it itself, and nobody waits for a busy core.
    Raises:
        ArtifactError: from the call, as `ArtifactReader.verify_layer`.
    """
    ahead = {
        layer: verifier.submit(reader.verify_layer, layer, num_tokens=num_tokens)
        for layer in reader.layers
    }

    def verified(layer: int) -> None:
        if not ahead[layer].cancel():
            ahead[layer].result()

    try:
        yield verified
    finally:
        # The reader is closed next, which takes the memory away from what is still under way.
        wait([future for future in ahead.values() if not future.cancel()])


def _encoding_of(manifest: ArtifactManifest) -> Encoding:
    names = {shard.layout.encoding for shard in manifest.shards}
    try:
        (name,) = names
        return Encoding(name)
    except ValueError:
        raise FingerprintMismatch(
            manifest.key, expected="one known encoding", found=" and ".join(sorted(names))
        ) from None


def _kernel_blocks(block_ids: Sequence[int], block_size: int, kernel_size: int) -> torch.Tensor:
    """The blocks of the page tensor: vLLM may split a block for its attention kernel."""
    ids = torch.tensor(block_ids, dtype=torch.int64)
    ratio = block_size // kernel_size
    if ratio == 1:
        return ids
    return (ids[:, None] * ratio + torch.arange(ratio)).flatten()


def _as_tensor(raw: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over an array's memory, whose numbers are as wide as the dtype's."""
    return torch.from_numpy(raw.view(f"i{dtype.itemsize}")).view(dtype)


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor as integers of the same width, which numpy knows."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    array: np.ndarray = tensor.view(integers).numpy()
    return array


def _start_saver() -> None:
    """Make the calling thread yield to others; Linux keeps niceness per thread."""
    unpin_thread()
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _SAVER_NICENESS)
    except (AttributeError, PermissionError, OSError):
        logger.debug("memos: this platform keeps the saver at normal priority")
