"""`PlaintextStore`: memories that are found by search, kept up with the catalog."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

from memos_vllm.domain.access import Principal
from memos_vllm.domain.checks import MAX_TEXT_BYTES
from memos_vllm.domain.filters import matches
from memos_vllm.domain.indexing import IndexBacklog
from memos_vllm.domain.memory import Memory
from memos_vllm.domain.scope import FilterFields, Scope
from memos_vllm.domain.search import (
    MAX_ANSWER_BYTES,
    Hop,
    SearchHit,
    SearchQuery,
    SearchResult,
    checked_query,
)
from memos_vllm.errors import InvalidRequest, Unavailable
from memos_vllm.plaintext.embedders.base import Embedder
from memos_vllm.plaintext.embedders.words_only import WordsOnly
from memos_vllm.plaintext.follower import Follower
from memos_vllm.plaintext.index.base import IndexStore
from memos_vllm.plaintext.indexer import Collections, Indexer
from memos_vllm.plaintext.purging import Purger
from memos_vllm.plaintext.rerankers import Reranker
from memos_vllm.plaintext.retrieval import RankedMemory, Retriever
from memos_vllm.plaintext.scoped_graph import ScopedGraph, SearchedCatalog

# After a batch of writes, a search that would miss them waits this long for the index.
CATCH_UP_SECONDS = 10.0
# A walk that has more before it does not end in that time.
_MEMORIES_WAITED_FOR = 1000
_LOOK_SECONDS = 0.5
_READY = "ready"

T = TypeVar("T")


class PlaintextStore:
    """Search over the memories of a catalog, and the thread that indexes them.

    Thread-safe. Holds nothing that a crash can lose: the index follows the catalog.

    Args:
        store: opens where collections live; may raise Unavailable, and is asked again then.
        embedder: opens what vectors are made with; likewise.
        former_embedder: the same for a collection's embedder of an earlier run, by its key.
        reranker: puts the best hits into another order, when there is one.
    """

    def __init__(
        self,
        catalog: SearchedCatalog,
        *,
        store: Callable[[], IndexStore],
        embedder: Callable[[], Embedder],
        former_embedder: Callable[[str], Embedder],
        reranker: Reranker | None = None,
    ) -> None:
        self._catalog = catalog
        self._reranker = reranker
        self._steps = _Steps()
        self._collections = Collections(catalog, store, embedder, former_embedder=former_embedder)
        self._indexer = Indexer(self._collections, on_progress=self._steps.note)
        self._purger = Purger(self._open_collections)

    def start(self) -> None:
        """Open the index and follow the catalog, in the background."""
        self._indexer.start()

    def close(self) -> None:
        """Finish the batch under way and let go of the index."""
        self._indexer.stop()

    def wake(self) -> None:
        """Something was written; index it now and not at the next look."""
        self._indexer.wake()

    def search(
        self,
        actor: Principal,
        cube_ids: Sequence[str],
        query: SearchQuery,
        *,
        catch_up_seconds: float = CATCH_UP_SECONDS,
    ) -> SearchResult:
        """Find memories by meaning, words and edges, best first.

        Args:
            cube_ids: 1 to 8, searched as one.
            catch_up_seconds: how long to wait for changes that the index has not followed yet;
                what is left then stands in the result.
        Raises:
            NotFound: a cube that the actor may not read.
            InvalidRequest, TooLarge: the query.
            Unavailable: the index or the embedder is down.
        """
        checked_query(query)
        if self._current() is None and not self.opened:
            # It was started a moment ago, perhaps after a crash.
            self._steps.wait_until(lambda: self.opened, catch_up_seconds)
        with self._catalog.snapshot():
            # Asked before the index is: who may not read learns nothing of the index either.
            scope = self._catalog.search_scope(actor, cube_ids)
            collection = self._collection()
            backlog = self._left(collection, cube_ids, labels=scope.labels)
        if not _is_all(backlog):
            backlog = self._catch_up(collection, scope, catch_up_seconds)
            # Cubes, grants and the time may not be what they were.
            scope = self._catalog.search_scope(actor, cube_ids)
        ranked = self._rank(scope, query)
        memories = self._load(scope, query, ranked)
        hits = [_hit(entry, memories) for entry in ranked if entry.seq in memories]
        return SearchResult(tuple(hits), backlog)

    def wait_until_indexed(self, cube_id: str, *, seconds: float) -> bool:
        """Wait until nothing of a cube is left to index; whether that was in time."""

        def done() -> bool:
            collection = self._current()
            return collection is not None and _is_all(self._left(collection, [cube_id]))

        self._indexer.wake()
        return self._steps.wait_until(done, seconds)

    def backlog(self, cube_id: str) -> int:
        """How many changes and memories of a cube the index has still before it.

        Raises:
            Unavailable: the index is not open.
        """
        left = self._left(self._collection(), [cube_id])
        return left.changes + left.memories

    def points_left(self, seqs: Sequence[int], *, entry: int) -> int | None:
        """How many of these memories the index still has, asked one by one.

        Args:
            entry: what the outbox had to say of them last.
        Returns:
            None as long as a collection has not durably followed up to there.
        Raises:
            Unavailable: the index is not open, or down.
        """
        self._indexer.wake()
        self._collection()
        collections = self._open_collections()
        if any(one.saved < entry for one in collections):
            return None
        return sum(
            any(found.seq == seq for found in one.index.versions(after=seq - 1, limit=1))
            for one in collections
            for seq in seqs
        )

    def purged(self, entry: int) -> bool | None:
        """Whether the index's files hold no bytes of what was deleted up to this entry.

        Starts to rewrite them when they do. None where the store does that by itself.

        Raises:
            Unavailable: what the last try ended with; the next call tries again.
        """
        return self._purger.purged(entry)

    def problem(self) -> str | None:
        """Why searches fail or the index stands still, None when all is well."""
        return self._indexer.state.problem

    @property
    def opened(self) -> bool:
        """Whether the index was opened, or could not be, since the start."""
        return self._indexer.state.tried

    def status(self) -> dict[str, object]:
        """The index's state, for a person."""
        shown: dict[str, object] = {"state": self.problem() or _READY}
        collections = self._collections
        for role, one in (("serving", collections.serving), ("building", collections.building)):
            if one is not None:
                left = self._left(one)
                shown[role] = {
                    "collection": one.name,
                    "embedder": one.embedder.key,
                    "dimension": one.embedder.dimension,
                    "points": _asked(one.index.count),
                    "optimizing": _asked(one.index.optimizing),
                    "changes_left": left.changes,
                    "memories_left": left.memories,
                    "problem": collections.problem_of(one),
                }
        return shown

    def _rank(self, scope: Scope, query: SearchQuery) -> Sequence[RankedMemory]:
        problem: Unavailable | None = None
        for collection in self._to_ask():
            try:
                with collection.in_use(), ExitStack() as snapshot:
                    retriever = Retriever(
                        embedder=None
                        if collection.embedder.key == WordsOnly.key
                        else collection.embedder,
                        index=collection.index,
                        graph=ScopedGraph(
                            self._catalog, scope, snapshot, embedder=collection.embedder
                        ),
                        reranker=self._reranker,
                    )
                    return retriever.search(
                        query.text,
                        scope=scope,
                        where=query.where,
                        top_k=query.top_k,
                        hops=query.hops,
                    )
            except Unavailable as error:
                problem = error
        self._indexer.doubt()
        raise problem or self._not_open()

    def _to_ask(self) -> Iterator[Follower]:
        """The collection that answers; when it fails, the one that is to take its place."""
        asked: list[Follower] = []
        while True:
            left = [one for one in self._open_collections() if one not in asked]
            if not left:
                return
            asked.append(left[0])
            yield left[0]

    def _load(
        self, scope: Scope, query: SearchQuery, ranked: Sequence[RankedMemory]
    ) -> dict[int, Memory]:
        """What was found, as it is now: the index may lag behind the catalog."""
        seqs = _all_seqs(ranked)
        if len(seqs) * MAX_TEXT_BYTES > MAX_ANSWER_BYTES:
            held = self._catalog.text_bytes(seqs)
            if held > MAX_ANSWER_BYTES:
                raise InvalidRequest(
                    f"what was found holds {held >> 20} MiB of text, and an answer at most "
                    f"{MAX_ANSWER_BYTES >> 20}; ask for fewer than {query.top_k} memories",
                    param="top_k",
                )
        found = self._catalog.load_found(scope, seqs, answering=True)
        where = query.where
        if where is None:
            return found
        return {seq: one for seq, one in found.items() if matches(where, FilterFields.of(one))}

    def _open_collections(self) -> list[Follower]:
        present = (self._collections.serving, self._collections.building)
        return [one for one in present if one is not None]

    def _current(self) -> Follower | None:
        return self._collections.serving or self._collections.building

    def _collection(self) -> Follower:
        collection = self._current()
        if collection is None:
            raise self._not_open()
        return collection

    def _not_open(self) -> Unavailable:
        return Unavailable(
            f"search is not available: {self.problem() or 'the index is being opened'}",
            retry_after_seconds=2,
        )

    def _left(
        self,
        collection: Follower,
        cube_ids: Sequence[str] | None = None,
        *,
        labels: frozenset[str] | None = None,
        up_to: int | None = None,
    ) -> IndexBacklog:
        return self._catalog.index_backlog(
            collection.name,
            cube_ids=cube_ids,
            labels=labels,
            applied=collection.reached(cube_ids or ()),
            up_to=up_to,
        )

    def _catch_up(self, collection: Follower, scope: Scope, seconds: float) -> IndexBacklog:
        """Wait for what was written until now and may be seen, not for what others go on writing.

        Returns:
            What is left.
        """
        newest = self._catalog.newest_change()
        left = IndexBacklog(0, 0)

        def done() -> bool:
            nonlocal left
            left = self._left(collection, scope.cube_ids, labels=scope.labels, up_to=newest)
            collection.hurry(scope.cube_ids if left.changes else ())
            walking = 0 < left.memories <= _MEMORIES_WAITED_FOR
            # An index that is down follows nothing; what it has is searched at once.
            return not (left.changes or walking) or self.problem() is not None

        self._indexer.wake()
        self._steps.wait_until(done, seconds)
        return left


class _Steps:
    """Counts what the indexer does, so that whoever waits for it misses nothing."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    def note(self) -> None:
        """One more."""
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Look after every step whether a condition has come true; whether it has in time."""
        deadline = time.monotonic() + seconds
        while True:
            before = self._count
            if condition():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with self._changed:
                if self._count == before:
                    self._changed.wait(min(left, _LOOK_SECONDS))


def _is_all(left: IndexBacklog) -> bool:
    return not left.changes and not left.memories


def _all_seqs(ranked: Sequence[RankedMemory]) -> list[int]:
    """The memories that were found and those that led to them."""
    seqs = [entry.seq for entry in ranked]
    seqs += [hop.origin for entry in ranked for hop in entry.via or ()]
    return list(dict.fromkeys(seqs))


def _hit(entry: RankedMemory, memories: Mapping[int, Memory]) -> SearchHit:
    via = tuple(
        Hop(
            origin=memories[hop.origin].id,
            kind=hop.kind,
            forward=hop.forward,
            weight=hop.weight,
            detail=hop.detail,
        )
        for hop in entry.via or ()
        if hop.origin in memories
    )
    scores = dict(entry.components)
    if entry.cosine is not None:
        scores["cosine"] = entry.cosine
    if entry.bm25 is not None:
        scores["bm25"] = entry.bm25
    return SearchHit(memories[entry.seq], entry.score, scores, via)


def _asked(question: Callable[[], T]) -> T | None:
    """The index's answer; None while it is down."""
    try:
        return question()
    except Unavailable:
        return None


__all__ = ["CATCH_UP_SECONDS", "PlaintextStore", "SearchedCatalog"]
