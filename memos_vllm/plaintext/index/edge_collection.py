"""One embedded collection: a shard of Qdrant Edge, opened, written, searched and optimised.

Every call of Edge holds the GIL, searches too: see `qdrant_edge` for the process around this.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import qdrant_edge as edge

from memos_vllm.domain.ids import CubeId
from memos_vllm.errors import Unavailable
from memos_vllm.plaintext.index.base import Hit, IndexedVersion, IndexPoint, IndexQuery
from memos_vllm.plaintext.index.conditions import in_cubes
from memos_vllm.plaintext.index.edge_folder import CollectionFolder
from memos_vllm.plaintext.index.edge_objects import (
    edge_filter,
    edge_point,
    edge_query,
    found_point,
)
from memos_vllm.plaintext.index.edge_shards import (
    open_shard,
    put_records,
    retrieve_whole,
    speaking,
    unindexed,
)
from memos_vllm.plaintext.index.queries import (
    FULL_SCAN_POINTS,
    PAYLOAD_WANTED,
    Found,
    PlannedQuery,
    check_dimension,
    check_points,
    merged_scores,
    merged_search,
    plan_score,
    plan_search,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

# One call of Edge: 256 points take 20 ms, during which nothing else of this process runs.
_BATCH = 256
# After an optimisation, what was written meanwhile is optimised as well once nothing has come for
# so long, when it is a twentieth of all.
_QUIET_SECONDS = 5.0
_QUIET_SHARE = 20
_OPTIMIZER = "memos_vllm.plaintext.index.edge_optimizer"


class EdgeCollection:
    """A `VectorIndex` in this process.

    Up to `FULL_SCAN_POINTS` of a cube are scanned, so small cubes never need optimising. Where one
    is larger, the collection is optimised in the background once a third of it has changed, and
    once more when the writing has stopped: a copy of the shard is optimised by another process,
    brought up to date, and takes the shard's place.
    """

    def __init__(self, folder: Path, *, dim: int) -> None:
        self.name = folder.name
        self._folder = CollectionFolder(folder)
        self._dim = dim
        # Held while writing, and while a shard is copied or replaced; a search waits for neither.
        self._writes = threading.RLock()
        self._reads = threading.Lock()
        self._optimizing = threading.Lock()
        self._optimizer: subprocess.Popen[bytes] | None = None
        self._problem: Unavailable | None = None
        self._closing = threading.Event()
        # What changed since the shard was copied; None while no copy is being optimised.
        self._touched: set[int] | None = None
        self._gone_cubes: set[CubeId] = set()
        opened = open_shard(self._folder, dim=dim)
        self._shard, self._path = opened.shard, opened.path
        self.made_anew = opened.made_anew
        # Also when it is not new: a crash after creating it must not make it look complete.
        self.opened_empty = self.count() == 0
        # Both count points written since the last time; the second is when to look again.
        self._changes, self._decide_at = unindexed(self._shard), FULL_SCAN_POINTS

    def search(
        self,
        query: IndexQuery,
        *,
        dense_limit: int,
        sparse_limit: int,
    ) -> list[Hit]:
        self._check_query(query)
        planned = plan_search(query, dense_limit=dense_limit, sparse_limit=sparse_limit)
        return merged_search(planned, self._answers(planned), dense_limit=dense_limit)

    def score(self, seqs: Sequence[int], query: IndexQuery) -> list[Hit]:
        self._check_query(query)
        planned = plan_score(seqs, query)
        return merged_scores(planned, self._answers(planned), query=query)

    def versions(
        self, *, after: int = 0, limit: int = 1000, cube_id: CubeId | None = None
    ) -> list[IndexedVersion]:
        request = edge.ScrollRequest(
            offset=after + 1,
            limit=limit,
            filter=_of_cube(cube_id),
            with_payload=list(PAYLOAD_WANTED),
            with_vector=False,
        )
        records, _ = self._read(lambda shard: shard.scroll(request))
        return [
            IndexedVersion(int(record.id), int(payload["v"]), CubeId(payload["cube"]))
            for record in records
            if (payload := record.payload) is not None
        ]

    def count(self, *, cube_id: CubeId | None = None) -> int:
        request = edge.CountRequest(exact=True, filter=_of_cube(cube_id))
        return self._read(lambda shard: shard.count(request))

    def upsert(self, points: Sequence[IndexPoint]) -> None:
        check_points(points, self._dim, collection=self.name)
        for batch in _batches(points):
            operation = edge.UpdateOperation.upsert_points([edge_point(point) for point in batch])
            self._write(operation, changed=[point.seq for point in batch])

    def delete(self, seqs: Sequence[int]) -> None:
        for batch in _batches(seqs):
            self._write(edge.UpdateOperation.delete_points(list(batch)), changed=batch)

    def delete_cube(self, cube_id: CubeId) -> None:
        with self._writes:
            count = self.count(cube_id=cube_id)
            where = edge_filter({"must": [in_cubes([cube_id])]})
            self._write(edge.UpdateOperation.delete_points_by_filter(where), changed=())
            self._changes += count
            if self._touched is not None:
                self._gone_cubes.add(cube_id)

    def flush(self) -> None:
        with self._writes, self._speaking("flushed"):
            self._opened().flush()
        if self._is_due():
            self.start_optimizing()

    def optimize(self) -> None:
        with self._optimizing:
            self._optimize()

    def start_optimizing(self) -> None:
        """Optimise in a thread of this process, unless that is being done already."""
        if self._optimizing.acquire(blocking=False):
            self._start_in_background(self._optimize_in_background)

    def purge(self) -> bool:
        with self._optimizing:
            self._purge()
        return True

    def start_purging(self) -> str | None:
        """Purge in a thread of this process; None while something else is being done there.

        Returns:
            The generation that it began with. Once `optimizing` ends and it is still current,
            nothing was purged.
        """
        if not self._optimizing.acquire(blocking=False):
            return None
        before = self.generation()
        self._start_in_background(self._purge_in_background)
        return before

    def generation(self) -> str:
        """The name of the shard that is current."""
        return self._path.name

    def optimizing(self) -> bool:
        """Whether it is being optimised; raises what ended the last time in the background."""
        if self._optimizing.locked():
            return True
        if self._problem is not None:
            raise self._problem
        return False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing.is_set()

    def close(self) -> None:
        with self._writes:
            if self.closed:
                return
            self._closing.set()
            if self._optimizer is not None:
                self._optimizer.kill()
            with self._reads, self._speaking("closed"):
                self._shard.flush()
                self._shard.close()
        # Its copy is removed before anyone opens the folder again.
        with self._optimizing:
            pass

    def _check_query(self, query: IndexQuery) -> None:
        if query.dense is not None:
            check_dimension(query.dense, self._dim, collection=self.name)

    def _answers(self, planned: Sequence[PlannedQuery]) -> list[list[Found]]:
        if not planned:
            return []
        batch = edge.QueryBatchRequest([edge_query(plan) for plan in planned])
        answers = self._read(lambda shard: shard.query_batch(batch))
        return [[found_point(point) for point in answer] for answer in answers]

    def _read(self, action: Callable[[edge.EdgeShard], T]) -> T:
        with self._reads, self._speaking("read"):
            return action(self._opened())

    def _write(self, operation: edge.UpdateOperation, *, changed: Sequence[int]) -> None:
        with self._writes, self._speaking("written"):
            self._opened().update(operation)
            self._changes += len(changed)
            if self._touched is not None:
                self._touched.update(changed)

    def _opened(self) -> edge.EdgeShard:
        if self.closed:
            raise Unavailable(f"the index '{self.name}' is closed")
        return self._shard

    def _speaking(self, done: str) -> AbstractContextManager[None]:
        return speaking(self._folder.path, done)

    def _is_due(self) -> bool:
        if self._changes < self._decide_at or self.closed:
            return False
        count = self.count()
        # Small cubes gain nothing by it: 2 ms before and after with 200,000 in 2,000 cubes.
        helps = self._largest_cube() > FULL_SCAN_POINTS and self._changes >= count // 3
        # What was replaced or deleted is still on disk, until then.
        tidies = self._changes >= 3 * count
        self._decide_at = self._changes + FULL_SCAN_POINTS // 4
        return helps or tidies

    def _is_due_again(self) -> bool:
        """Whether enough was written meanwhile; for less, wait until the writing has stopped."""
        known = -1
        while not self.closed:
            if self._is_due():
                return True
            changes = self._changes
            if changes < max(self.count() // _QUIET_SHARE, _BATCH):
                return False
            if changes == known:
                return self._largest_cube() > FULL_SCAN_POINTS
            known = changes
            self._closing.wait(_QUIET_SECONDS)
        return False

    def _largest_cube(self) -> int:
        request = edge.FacetRequest("cube", limit=1)
        found = self._read(lambda shard: shard.facet(request))
        return max((hit.count for hit in found.hits), default=0)

    def _start_in_background(self, work: Callable[[], None]) -> None:
        self._problem = None
        threading.Thread(target=work, name="memos-edge-optimize", daemon=True).start()

    def _purge_in_background(self) -> None:
        try:
            self._purge()
        except Unavailable as error:
            self._problem = error
        finally:
            self._optimizing.release()

    def _optimize_in_background(self) -> None:
        try:
            self._optimize()
            while self._is_due_again():
                self._optimize()
        except Unavailable as error:
            self._problem = error
            if not self.closed:
                # Tried again after as many changes; until then searches only take longer.
                self._changes, self._decide_at = 0, FULL_SCAN_POINTS
                logger.warning("memos: %s", error)
        finally:
            self._optimizing.release()

    def _purge(self) -> None:
        """As `_optimize`, by way of a shard that is written anew from what the copy holds.

        Edge could be told to rewrite each segment that holds anything deleted, but its log would
        keep the vectors, and without its log it takes up numbers again that points have already.
        """
        with self._speaking("purged"):
            copy = self._folder.new_generation()
            try:
                self._copy_to(copy)
                with self._next_generation() as fresh:
                    self._run_optimizer(copy, "--into", str(fresh), str(self._dim))
                    self._replace(fresh)
            finally:
                self._touched = None
                shutil.rmtree(copy, ignore_errors=True)

    def _optimize(self) -> None:
        with self._speaking("optimised"), self._next_generation() as fresh:
            try:
                self._copy_to(fresh)
                self._run_optimizer(fresh)
                self._replace(fresh)
            finally:
                self._touched = None

    @contextmanager
    def _next_generation(self) -> Iterator[Path]:
        """A folder that this collection is to be replaced by; gone again when that fails."""
        fresh = self._folder.new_generation()
        try:
            yield fresh
        except BaseException:
            if self._path != fresh:
                shutil.rmtree(fresh, ignore_errors=True)
            raise

    def _copy_to(self, fresh: Path) -> None:
        with self._writes:
            self._opened().flush()
            self._touched, self._gone_cubes = set(), set()
            shutil.copytree(self._path, fresh)

    def _run_optimizer(self, path: Path, *options: str) -> None:
        with self._writes:
            self._opened()
            self._optimizer = subprocess.Popen(
                [sys.executable, "-m", _OPTIMIZER, str(path), *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        _, stderr = self._optimizer.communicate()
        code, self._optimizer = self._optimizer.returncode, None
        if code != 0:
            lines = stderr.decode(errors="replace").strip().splitlines()
            raise Unavailable(
                f"optimising the index '{self.name}' ended with status {code}"
                + (f": {lines[-1]}" if lines else "")
            )

    def _replace(self, path: Path) -> None:
        """Bring the optimised copy up to date and let it take the shard's place."""
        fresh = edge.EdgeShard.load(str(path))
        unused = fresh
        try:
            caught_up = 0
            while self._touched is not None and len(self._touched) > _BATCH:
                caught_up += self._catch_up(fresh, gently=True)
            with self._writes:
                self._opened()
                caught_up += self._catch_up(fresh)
                fresh.flush()
                self._folder.make_current(path, dim=self._dim)
                with self._reads:
                    unused, self._shard = self._shard, fresh
                self._path, self._changes = path, caught_up
                self._decide_at = FULL_SCAN_POINTS
        finally:
            unused.close()
        self._folder.remove_others(path)

    def _catch_up(self, fresh: edge.EdgeShard, *, gently: bool = False) -> int:
        """Bring what changed into `fresh`; `gently` leaves half of the time to searches."""
        with self._writes:
            touched, gone_cubes = self._touched or set(), self._gone_cubes
            self._touched, self._gone_cubes = set(), set()
        for cube_id in gone_cubes:
            where = edge_filter({"must": [in_cubes([cube_id])]})
            fresh.update(edge.UpdateOperation.delete_points_by_filter(where))
        for batch in _batches(sorted(touched)):
            wanted, began = list(batch), time.monotonic()
            records = self._read(partial(retrieve_whole, seqs=wanted))
            put_records(fresh, wanted, records)
            if gently:
                self._closing.wait(time.monotonic() - began)
        return len(touched)


def _of_cube(cube_id: CubeId | None) -> edge.Filter | None:
    return None if cube_id is None else edge_filter({"must": [in_cubes([cube_id])]})


def _batches(items: Sequence[T]) -> Iterable[Sequence[T]]:
    return (items[start : start + _BATCH] for start in range(0, len(items), _BATCH))
