"""An index in memory that fails and forgets when told to, an embedder that counts, the truth."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from catalog_kit import Desk
from index_kit import PlainIndex, cosine, folder_in_memory

from memos_vllm.control.access import OpenCube
from memos_vllm.control.tables import CubeRow, MemoryRow
from memos_vllm.control.views import load_memories
from memos_vllm.domain.access import Role
from memos_vllm.domain.ids import CubeId
from memos_vllm.domain.memory import Memory, MemoryState
from memos_vllm.domain.scope import FilterFields
from memos_vllm.errors import ConfigurationError, InvalidRequest, MemosError, Unavailable
from memos_vllm.plaintext.document import indexed_text
from memos_vllm.plaintext.embedders.base import Embedder, Vectors
from memos_vllm.plaintext.index.base import (
    Hit,
    IndexedVersion,
    IndexPoint,
    IndexQuery,
    IndexStore,
    VectorIndex,
)
from memos_vllm.plaintext.index.qdrant_edge import EdgeStore
from memos_vllm.plaintext.indexer import Collections
from memos_vllm.plaintext.store import PlaintextStore
from memos_vllm.plaintext.terms import document_terms

# Longer than anything here takes on a busy machine.
LONG_SECONDS = 30.0


class CountingEmbedder:
    """Vectors from a digest of the text, and what it was asked for.

    Args:
        refused: texts with this word are refused.
    """

    max_tokens = 100

    def __init__(self, key: str = "fake-a", *, dimension: int = 4, refused: str = "\x00") -> None:
        self.key = key
        self.dimension = dimension
        self.refused = refused
        self.failure: MemosError | None = None
        self.texts: Counter[str] = Counter()
        self.calls = 0
        self.closed = 0

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        if any(self.refused in text for text in texts):
            raise InvalidRequest("the fake embedder refuses a text")
        self.texts.update(texts)
        return np.stack([self.vector(text) for text in texts])

    def embed_query(self, text: str) -> Vectors:
        if self.failure is not None:
            raise self.failure
        return self.vector(text)

    def close(self) -> None:
        self.closed += 1

    def vector(self, text: str) -> Vectors:
        """[dimension], of length 1."""
        digest = hashlib.blake2b(f"{self.key}\n{text}".encode(), digest_size=self.dimension)
        vector = np.frombuffer(digest.digest(), np.uint8).astype(np.float32) - 127.5
        found: Vectors = vector / np.linalg.norm(vector)
        return found


@dataclass
class Disk:
    """What collections hold after a crash, and where to fail.

    Args:
        fail_at: this call of the store, counted from `calls` = 0, raises Unavailable.
        after: whether the call has its effect all the same.
        forgets: whether an index that fails loses what was not flushed, and goes on.
        down: every call raises.
    """

    points: dict[str, dict[int, IndexPoint]] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    fail_at: int | None = None
    after: bool = False
    forgets: bool = False
    down: bool = False
    calls: int = 0
    open_now: set[str] = field(default_factory=set)

    @contextmanager
    def call(self) -> Iterator[None]:
        self.calls += 1
        fails = self.down or self.calls == self.fail_at
        if fails and not self.after:
            raise Unavailable("the fake index is down")
        yield
        if fails:
            raise Unavailable("the fake index is down")


class FakeStore:
    """An `IndexStore` over a `Disk`: what was not flushed is lost unless it is closed."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.opened: list[FakeIndex] = []
        with disk.call():
            pass

    def open(self, name: str, *, dim: int) -> FakeIndex:
        with self.disk.call():
            if self.disk.dims.setdefault(name, dim) != dim:
                raise ConfigurationError("another dimension")
        assert name not in self.disk.open_now, "open already"
        self.disk.open_now.add(name)
        self.opened.append(FakeIndex(self.disk, name))
        return self.opened[-1]

    def collections(self) -> list[str]:
        with self.disk.call():
            return sorted(self.disk.dims)

    def drop(self, name: str) -> None:
        with self.disk.call():
            assert name not in self.disk.open_now, "still open"
            self.disk.points.pop(name, None)
            self.disk.dims.pop(name, None)

    def close(self) -> None:
        for index in self.opened:
            index.close()

    def crash(self, *, keep: int = 0) -> None:
        """End without closing; the first `keep` writes since the flush were on the disk already."""
        for index in self.opened:
            index.crash(keep)


class FakeIndex:
    """A `VectorIndex` of dictionaries."""

    def __init__(self, disk: Disk, name: str) -> None:
        self.name = name
        self._disk = disk
        self._held = PlainIndex(dict(disk.points.get(name, {})))
        self._unflushed: list[Callable[[PlainIndex], None]] = []
        self._closed = False
        self.opened_empty = not self._held.points

    @contextmanager
    def _call(self) -> Iterator[PlainIndex]:
        if self._closed:
            raise Unavailable("the fake index is closed")
        try:
            with self._disk.call():
                yield self._held
        except Unavailable:
            if self._disk.forgets:
                self._held = PlainIndex(dict(self._disk.points.get(self.name, {})))
                self._unflushed.clear()
            raise

    def _write(self, change: Callable[[PlainIndex], None]) -> None:
        with self._call() as held:
            change(held)
            self._unflushed.append(change)

    def search(
        self,
        query: IndexQuery,
        *,
        dense_limit: int,
        sparse_limit: int,
    ) -> list[Hit]:
        with self._call() as held:
            dense = _best(held.dense_scores(query), dense_limit)
            sparse = _best(held.sparse_scores(query), sparse_limit)
            return [
                self._hit(held.points[seq], dense.get(seq), sparse.get(seq))
                for seq in [*dense, *(seq for seq in sparse if seq not in dense)]
            ]

    def score(self, seqs: Sequence[int], query: IndexQuery) -> list[Hit]:
        with self._call() as held:
            by_terms = held.sparse_scores(query)
            return [
                self._hit(
                    point,
                    None if query.dense is None else cosine(query.dense, point.dense),
                    None if query.sparse is None else by_terms.get(point.seq, 0.0),
                )
                for point in held.passing(query)
                if point.seq in set(seqs)
            ]

    @staticmethod
    def _hit(point: IndexPoint, dense: float | None, sparse: float | None) -> Hit:
        return Hit(point.seq, point.version, point.cube_id, dense, sparse)

    def versions(
        self, *, after: int = 0, limit: int = 1000, cube_id: CubeId | None = None
    ) -> list[IndexedVersion]:
        with self._call() as held:
            found = [one for one in held.versions() if one.seq > after]
            return [one for one in found if cube_id in (None, one.cube_id)][:limit]

    def count(self, *, cube_id: CubeId | None = None) -> int:
        return len(self.versions(limit=10**9, cube_id=cube_id))

    def upsert(self, points: Sequence[IndexPoint]) -> None:
        self._write(lambda held: held.upsert(points))

    def delete(self, seqs: Sequence[int]) -> None:
        self._write(lambda held: held.delete(seqs))

    def delete_cube(self, cube_id: CubeId) -> None:
        self._write(lambda held: held.delete_cube(cube_id))

    def flush(self) -> None:
        with self._call():
            self._keep(len(self._unflushed))

    def optimize(self) -> None:
        pass

    def optimizing(self) -> bool:
        return False

    def purge(self) -> bool:
        with self._call():
            return True

    def close(self) -> None:
        if not self._closed:
            self._keep(len(self._unflushed))
            self._end()

    def crash(self, keep: int) -> None:
        if not self._closed:
            self._keep(keep)
            self._end()

    def _keep(self, number: int) -> None:
        disk = PlainIndex(self._disk.points.setdefault(self.name, {}))
        for change in self._unflushed[:number]:
            change(disk)
        del self._unflushed[:number]

    def _end(self) -> None:
        self._closed = True
        self._disk.open_now.discard(self.name)


def _best(scores: dict[int, float], limit: int) -> dict[int, float]:
    return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:limit])


@dataclass
class Bench:
    """A catalog, and collections over a disk that are stepped by hand."""

    desk: Desk
    disk: Disk = field(default_factory=Disk)
    embedder: CountingEmbedder = field(default_factory=CountingEmbedder)
    formers: dict[str, CountingEmbedder] = field(default_factory=dict)
    stores: list[FakeStore] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plaintext = self._new()

    def _new(self) -> PlaintextStore:
        self.formers[self.embedder.key] = self.embedder
        return PlaintextStore(
            self.desk.mos,
            store=self._open_store,
            embedder=lambda: self.embedder,
            former_embedder=self._former,
        )

    def _open_store(self) -> FakeStore:
        self.stores.append(FakeStore(self.disk))
        return self.stores[-1]

    def _former(self, key: str) -> Embedder:
        if key not in self.formers:
            raise ConfigurationError(f"no embedder '{key}'")
        return self.formers[key]

    @property
    def collections(self) -> Collections:
        return self.plaintext._collections

    def step(self) -> bool:
        return self.collections.step()

    def settle(self, *, most: int = 1000) -> None:
        """Step until nothing is left to do, whatever fails now and then; no pause is kept."""
        for _ in range(most):
            try:
                busy = self.step()
            except MemosError:
                self.collections.check()
                continue
            pauses = [*self.collections._pauses.values(), self.collections._tidying]
            if not busy and not any(pause.seconds for pause in pauses):
                return
            for pause in pauses:
                pause._until = 0.0
        raise AssertionError("it never comes to rest")

    def save(self) -> None:
        for follower in (self.collections.serving, self.collections.building):
            if follower is not None:
                follower.save()

    def crash(self, *, keep: int = 0) -> None:
        """The process ends and another one starts."""
        for store in self.stores:
            store.crash(keep=keep)
        self.desk.reopen()
        self.plaintext = self._new()

    def reopen(self, embedder: CountingEmbedder | None = None) -> None:
        """The process is stopped in order and started again, maybe with another embedder."""
        self.collections.close()
        self.desk.reopen()
        self.embedder = embedder or self.embedder
        self.plaintext = self._new()

    @property
    def index(self) -> VectorIndex:
        serving = self.collections.serving
        assert serving is not None
        return serving.index

    def points(self) -> dict[int, IndexPoint]:
        """What the collection that answers holds."""
        assert isinstance(self.index, FakeIndex)
        return self.index._held.points

    def check(self) -> None:
        """The index is what the catalog says, and nothing else is left anywhere."""
        truth = active_memories(self.desk)
        points = self.points()
        assert points.keys() == truth.keys()
        for seq, memory in truth.items():
            point, text = points[seq], indexed_text(memory)
            assert (point.version, point.cube_id) == (memory.version, memory.cube_id)
            assert point.fields == FilterFields.of(memory)
            expected = document_terms(text.sparse)
            assert point.sparse.indices.tolist() == expected.indices.tolist()
            assert point.sparse.values.tolist() == expected.values.tolist()
            if self.embedder.refused not in text.dense:
                vector = self.embedder.vector(text.dense)
                assert np.allclose(point.dense, vector, atol=2e-3), "another text's vector"
        assert set(self.disk.dims) == {self.collections.serving.name}  # type: ignore[union-attr]
        assert [one.name for one in self.desk.mos.indexes()] == sorted(self.disk.dims)


def active_memories(desk: Desk) -> dict[int, Memory]:
    """What should be indexed, by number."""
    with desk.mos._catalog.read() as session:
        rows = session.query(MemoryRow).filter(MemoryRow.state == MemoryState.ACTIVE).all()
        return {
            row.seq: load_memories(
                session,
                OpenCube(session.get_one(CubeRow, row.cube_id), Role.OWNER, frozenset()),
                [row],
            )[0]
            for row in rows
        }


def indexed(index: VectorIndex) -> dict[int, tuple[str, int]]:
    """Cube and version of everything in a collection, by number."""
    return {one.seq: (one.cube_id, one.version) for one in index.versions(limit=100_000)}


def expected(desk: Desk) -> dict[int, tuple[str, int]]:
    """What `indexed` should be."""
    return {seq: (one.cube_id, one.version) for seq, one in active_memories(desk).items()}


def eventually(condition: Callable[[], bool], *, seconds: float = LONG_SECONDS) -> None:
    """Wait for what another thread or process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def child_pids() -> set[int]:
    """Processes that this one has started and that have not ended."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


@contextmanager
def running(
    desk: Desk,
    store: Callable[[], IndexStore],
    *,
    embedder: Embedder | None = None,
    former: Callable[[str], Embedder] | None = None,
) -> Iterator[PlaintextStore]:
    """A store with its thread."""
    chosen = embedder or CountingEmbedder()
    plaintext = PlaintextStore(
        desk.mos,
        store=store,
        embedder=lambda: chosen,
        former_embedder=former or CountingEmbedder,
    )
    plaintext.start()
    try:
        yield plaintext
    finally:
        plaintext.close()


@contextmanager
def edge_folder() -> Iterator[Callable[[], EdgeStore]]:
    """Opens the embedded index in one folder."""
    with folder_in_memory() as folder:
        yield lambda: EdgeStore(folder / "qdrant")


def kill(pid: int | None) -> None:
    """SIGKILL."""
    assert pid is not None
    os.kill(pid, 9)
