"""Keeps one collection of the index up with the catalog.

Invariants:
- An outbox entry counts as followed in the catalog only after what it led to was flushed. A crash
  at any moment repeats work, and never leaves any out.
- What is indexed is the state of the moment at which it was read, never older than the entry.
- Vectors are computed once per text and embedder, kept in the catalog, and taken from there.
- After a walk the collection holds what the catalog does and nothing else, whatever was in it.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from memos_vllm.domain.ids import CubeId
from memos_vllm.domain.indexing import (
    DerivedMemory,
    IndexBacklog,
    IndexProgress,
    MemoryToIndex,
    OutboxEntry,
)
from memos_vllm.domain.scope import FilterFields
from memos_vllm.errors import InvalidRequest, TooLarge, Unavailable
from memos_vllm.plaintext import packing
from memos_vllm.plaintext.document import IndexedText, indexed_text
from memos_vllm.plaintext.embedders.base import Embedder
from memos_vllm.plaintext.entities import entities_of
from memos_vllm.plaintext.index.base import DenseVector, IndexPoint, VectorIndex
from memos_vllm.plaintext.terms import document_terms

logger = logging.getLogger(__name__)

# Embedding a batch takes half a second on one core, and whoever waits for a memory or for the end
# waits that long. Batches of 64 took a tenth longer for each memory.
BATCH = 128
# What a crash makes us do again. A flush takes 35 ms, in which no search is answered.
SAVE_SECONDS = 1.0
# An embedder that is down fails for every text; one that fails this often may fail for one only.
_PATIENT_FAILURES = 5
_PROBE = "memory"
_DIGEST_BYTES = 24
_ENTITY_DIGEST_BYTES = 8
# Moves whenever entities are found in another way.
_ENTITY_FORMAT = b"1"


class IndexedCatalog(Protocol):
    """The catalog as an indexer sees it; `memos_vllm.control.indexing` says what each does."""

    def start_index(
        self, name: str, *, embedder: str, dimension: int, anew: bool
    ) -> IndexProgress: ...
    def index_agrees(self, name: str, *, points: int) -> bool: ...
    def indexes(self) -> list[IndexProgress]: ...
    def forget_index(self, name: str) -> None: ...
    def outbox(
        self, name: str, *, limit: int, after: int | None = None, cube_id: str | None = None
    ) -> list[OutboxEntry]: ...
    def newest_change(self) -> int: ...
    def next_to_walk(self, name: str, *, limit: int, after: int | None = None) -> list[int]: ...
    def memories_to_index(self, seqs: Sequence[int], *, embedder: str) -> list[MemoryToIndex]: ...
    def keep_derived(self, derived: Sequence[DerivedMemory], *, embedder: str) -> None: ...
    def advance_index(
        self, name: str, *, applied: int | None = None, walked: int | None = None
    ) -> None: ...
    def end_walk(self, name: str) -> None: ...
    def catalog_uid(self) -> str: ...
    def index_backlog(
        self,
        name: str,
        *,
        cube_ids: Sequence[str] | None = None,
        labels: frozenset[str] | None = None,
        applied: int | None = None,
        up_to: int | None = None,
    ) -> IndexBacklog: ...


class Follower:
    """One collection that follows the catalog, and the embedder that fills it.

    One thread calls `step` and `save`; any may read, and searches within `in_use`.

    Args:
        clock: seconds that only grow.
    Raises:
        Unavailable: the store or the catalog is down.
    """

    def __init__(
        self,
        catalog: IndexedCatalog,
        embedder: Embedder,
        index: VectorIndex,
        *,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.embedder = embedder
        self.index = index
        self._catalog = catalog
        self._clock = clock
        # How far the index has come, and how far the catalog knows that it has.
        self._applied = self._saved_applied = 0
        self._walked: int | None = None
        self._saved_walked: int | None = None
        self._unsaved_since: float | None = None
        # Cubes that someone waits for, and how far they were followed before their turn.
        self._hurried: frozenset[str] = frozenset()
        self._ahead: dict[str, int] = {}
        self._holds_nothing_else = index.opened_empty
        self._begun_again = False
        self._looked = False
        self._embedder_failures = 0
        self._searches = 0
        self._retired = False
        self._changed = threading.Condition()
        self.complete = False
        self._start(anew=index.opened_empty)
        if self.complete:
            self._begins_again()

    @property
    def saved(self) -> int:
        """The outbox entry up to which everything is durable in the index."""
        return self._saved_applied

    def reached(self, cube_ids: Sequence[str]) -> int:
        """The outbox entry up to which searches of these cubes find everything."""
        applied, ahead = self._applied, self._ahead
        return min((max(applied, ahead.get(cube_id, 0)) for cube_id in cube_ids), default=applied)

    def hurry(self, cube_ids: Sequence[str]) -> None:
        """Someone waits for these cubes: they come before what was written to others earlier."""
        with self._changed:
            self._hurried = self._hurried.union(cube_ids)

    def step(self) -> bool:
        """Follow one batch of changes, or else go one batch on with the first walk.

        Returns:
            Whether there was anything to do.
        Raises:
            Unavailable: the store, the catalog or the embedder is down. What was not saved is done
                again by the next step.
            NotFound: someone else removed the collection from the catalog.
        """
        with self._back_when_it_fails():
            busy = self._follow() or self._walk() or self._look()
            since = self._unsaved_since
            if since is not None and self._clock() - since >= SAVE_SECONDS:
                self.save()
        return busy

    def save(self) -> None:
        """Make durable what was done, and say so in the catalog; raises what `step` raises."""
        if self._unsaved_since is None:
            return
        with self._back_when_it_fails():
            self.index.flush()
            self._catalog.advance_index(self.name, applied=self._applied, walked=self._walked)
        self._saved_applied, self._saved_walked = self._applied, self._walked
        self._unsaved_since = None

    @contextmanager
    def _back_when_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Whatever has failed, the index may have lost what it had not made durable.
            self._applied, self._walked = self._saved_applied, self._saved_walked
            self._ahead = {}
            self._unsaved_since = None
            raise

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While a search asks the index and the embedder; raises Unavailable once retired."""
        with self._changed:
            if self._retired:
                raise Unavailable(f"the index '{self.name}' is closed")
            self._searches += 1
        try:
            yield
        finally:
            with self._changed:
                self._searches -= 1
                self._changed.notify_all()

    def retire(self, *, patience_seconds: float) -> None:
        """Refuse searches from now on, and wait for those under way, or until patience ends.

        Index and embedder stay open: they are the owner's.
        """
        with self._changed:
            self._retired = True
            self._changed.wait_for(lambda: self._searches == 0, patience_seconds)

    def _start(self, *, anew: bool) -> None:
        progress = self._catalog.start_index(
            self.name, embedder=self.embedder.key, dimension=self.embedder.dimension, anew=anew
        )
        self._applied = self._saved_applied = progress.applied
        self._walked = self._saved_walked = progress.walked
        self.complete = progress.complete

    def _note_unsaved(self) -> None:
        if self._unsaved_since is None:
            self._unsaved_since = self._clock()

    def _follow(self) -> bool:
        entries = self._catalog.outbox(self.name, limit=BATCH, after=self._applied)
        if not entries:
            return False
        self._run_ahead({entry.cube_id for entry in entries}, all_read=len(entries) < BATCH)
        for gone, group in itertools.groupby(entries, key=lambda entry: entry.memory_seq is None):
            if gone:
                for cube_id in dict.fromkeys(entry.cube_id for entry in group):
                    self.index.delete_cube(cube_id)
            else:
                self._put([entry.memory_seq for entry in group if entry.memory_seq is not None])
        self._note_unsaved()
        self._applied = entries[-1].seq
        return True

    def _run_ahead(self, present: Collection[str], *, all_read: bool) -> None:
        """Index a batch of each hurried cube of which none is present among the next entries.

        In its turn it is indexed again, from stored vectors, as it is then.
        """
        with self._changed:
            hurried, self._hurried = self._hurried, frozenset()
        if all_read:
            self._ahead = {}
            return
        for cube_id in hurried.difference(present):
            entries = self._catalog.outbox(
                self.name, limit=BATCH, after=self.reached([cube_id]), cube_id=cube_id
            )
            seqs = [entry.memory_seq for entry in entries if entry.memory_seq is not None]
            # The end of a cube removes all of it: that waits for its turn.
            if entries and len(seqs) == len(entries):
                self._put(seqs)
                self._ahead = {**self._ahead, cube_id: entries[-1].seq}

    def _walk(self) -> bool:
        if self.complete:
            return False
        assert self._walked is not None
        seqs = self._catalog.next_to_walk(self.name, limit=BATCH, after=self._walked)
        if not self._holds_nothing_else:
            self._remove_all_but(seqs, after=self._walked)
        self._note_unsaved()
        if seqs:
            self._put(seqs)
            self._walked = seqs[-1]
        else:
            self.save()
            self._end_walk()
        return True

    def _end_walk(self) -> None:
        if not self._begins_again():
            self._catalog.end_walk(self.name)
            self.complete = True
            logger.info("memos: the index '%s' is complete", self.name)

    def _look(self) -> bool:
        """Once, when nothing is left to do and so no doubt: whether all of it is there."""
        if self._looked:
            return False
        self._looked = True
        self.save()
        return self._begins_again()

    def _begins_again(self) -> bool:
        """Walk through everything again, once, unless as much is indexed as should be.

        An older copy of the index may have been put back, or it broke while it was in use.
        """
        if self._catalog.index_agrees(self.name, points=self.index.count()):
            return False
        if self._begun_again:
            logger.error("memos: the index '%s' does not keep what it is given", self.name)
            return False
        logger.warning(
            "memos: the index '%s' holds another number of memories than the catalog and is gone "
            "through again",
            self.name,
        )
        self._begun_again = True
        self._start(anew=True)
        return True

    def _remove_all_but(self, seqs: Sequence[int], *, after: int) -> None:
        """Remove what lies between `after` and the last of `seqs`, or the end, and is not there."""
        known, last = set(seqs), seqs[-1] if seqs else None
        while True:
            held = [entry.seq for entry in self.index.versions(after=after, limit=2 * BATCH)]
            within = [seq for seq in held if last is None or seq <= last]
            self._delete([seq for seq in within if seq not in known])
            if len(held) < 2 * BATCH or len(within) < len(held):
                return
            after = held[-1]

    def _put(self, seqs: Sequence[int]) -> None:
        """Make the index hold these memories as they are now."""
        wanted = list(dict.fromkeys(seqs))
        found = self._catalog.memories_to_index(wanted, embedder=self.embedder.key)
        alive = {item.seq for item in found}
        self._delete([seq for seq in wanted if seq not in alive])
        if not found:
            return
        texts = [indexed_text(item.memory) for item in found]
        vectors = self._vectors(found, texts)
        self.index.upsert(
            [
                IndexPoint(
                    seq=item.seq,
                    version=item.memory.version,
                    cube_id=CubeId(item.memory.cube_id),
                    dense=vector,
                    sparse=document_terms(text.sparse),
                    fields=FilterFields.of(item.memory),
                )
                for item, text, vector in zip(found, texts, vectors, strict=True)
            ]
        )

    def _delete(self, seqs: Sequence[int]) -> None:
        if seqs:
            self.index.delete(seqs)

    def _vectors(
        self, found: Sequence[MemoryToIndex], texts: Sequence[IndexedText]
    ) -> list[DenseVector]:
        """A vector for each memory, stored or computed; what was computed is kept."""
        digests = [_digest(item, text) for item, text in zip(found, texts, strict=True)]
        size = 2 * self.embedder.dimension
        packed = [
            item.vector
            if item.vector is not None
            and len(item.vector) == size
            and item.digest is not None
            and item.digest[:_DIGEST_BYTES] == digest[:_DIGEST_BYTES]
            else None
            for item, digest in zip(found, digests, strict=True)
        ]
        new = [place for place, vector in enumerate(packed) if vector is None]
        computed = self._embed([texts[place].dense for place in new])
        for place, computed_vector in zip(new, computed, strict=True):
            if computed_vector is not None:
                packed[place] = packing.packed(computed_vector)
        self._catalog.keep_derived(
            [
                _derived(item, digest, vector)
                for item, digest, vector in zip(found, digests, packed, strict=True)
                if vector is None or item.digest != digest or vector is not item.vector
            ],
            embedder=self.embedder.key,
        )
        # What has no vector is found by its words.
        nothing = np.zeros(self.embedder.dimension, np.float32)
        return [nothing if vector is None else packing.unpacked(vector) for vector in packed]

    def _embed(self, texts: Sequence[str]) -> list[DenseVector | None]:
        """A vector for each text, None for those that the embedder refuses."""
        if not texts:
            return []
        try:
            vectors = list(self.embedder.embed(texts))
        except (InvalidRequest, TooLarge):
            # One text that the embedder refuses must not hold up all that come after it.
            return [self._embed_alone(text, (InvalidRequest, TooLarge)) for text in texts]
        except Unavailable:
            self._embedder_failures += 1
            if self._embedder_failures < _PATIENT_FAILURES:
                raise
            # Some servers answer "internal error" to a text that they cannot take, and only to it.
            self.embedder.embed([_PROBE])
            refusals = (InvalidRequest, TooLarge, Unavailable)
            apart = [self._embed_alone(text, refusals) for text in texts]
            self.embedder.embed([_PROBE])
            return apart
        self._embedder_failures = 0
        return [*vectors]

    def _embed_alone(self, text: str, refusals: tuple[type[Exception], ...]) -> DenseVector | None:
        try:
            vector: DenseVector = self.embedder.embed([text])[0]
        except refusals as error:
            logger.warning(
                "memos: the embedder refuses a memory, which is found by its words only: %s", error
            )
            return None
        return vector


def _digest(item: MemoryToIndex, text: IndexedText) -> bytes:
    """What the vector was made of, and behind it what the entities were found in."""
    embedded = hashlib.blake2b(text.dense.encode(), digest_size=_DIGEST_BYTES)
    mentioned = hashlib.blake2b(_ENTITY_FORMAT, digest_size=_ENTITY_DIGEST_BYTES)
    author = item.memory.source.author
    mentioned.update(repr((author, item.memory.text)).encode())
    return embedded.digest() + mentioned.digest()


def _derived(item: MemoryToIndex, digest: bytes, vector: bytes | None) -> DerivedMemory:
    memory = item.memory
    return DerivedMemory(
        seq=item.seq,
        cube_id=memory.cube_id,
        digest=digest,
        vector=vector,
        entities=tuple(entities_of(memory.text, author=memory.source.author)),
    )
