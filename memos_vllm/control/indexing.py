"""What the search index has to follow: the outbox, and what is derived from texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache

from sqlalchemy import BigInteger, bindparam, delete, func, insert, select
from sqlalchemy.orm import Session

from memos_vllm.control.access import foreign_label, open_cube
from memos_vllm.control.calls import exactly_once, repeatable
from memos_vllm.control.jobs import queue_job
from memos_vllm.control.service import Service
from memos_vllm.control.sql import Prepared, one_of
from memos_vllm.control.tables import (
    EntityRow,
    IdentityRow,
    IndexRow,
    MemoryRow,
    OutboxRow,
    VectorRow,
)
from memos_vllm.control.views import to_job, to_memory
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.ids import CubeId
from memos_vllm.domain.indexing import (
    DerivedMemory,
    IndexBacklog,
    IndexProgress,
    MemoryToIndex,
    OutboxEntry,
)
from memos_vllm.domain.job import Job, JobKind
from memos_vllm.domain.memory import Lineage, MemoryState, Usage
from memos_vllm.errors import NotFound


def note_changed(session: Session, cube_id: str, seqs: Collection[int]) -> None:
    """Have the index look at these memories anew, once this transaction is committed."""
    if seqs:
        session.execute(
            insert(OutboxRow), [{"cube_id": cube_id, "memory_seq": seq} for seq in seqs]
        )


def note_gone(session: Session, cube_id: str) -> None:
    """Have the index drop everything of a cube. Earlier entries of the cube say no more."""
    session.execute(delete(OutboxRow).where(OutboxRow.cube_id == cube_id))
    session.execute(insert(OutboxRow), [{"cube_id": cube_id, "memory_seq": None}])


class IndexService(Service):
    """The index's part of `Mos`; its callers are the system's own."""

    def indexes(self) -> list[IndexProgress]:
        """Every known collection, oldest first."""
        with self._catalog.read() as session:
            rows = session.scalars(select(IndexRow).order_by(IndexRow.created_at, IndexRow.name))
            return [_progress(row) for row in rows]

    @repeatable
    def start_index(self, name: str, *, embedder: str, dimension: int, anew: bool) -> IndexProgress:
        """Make a collection known, or learn where it stands.

        Args:
            anew: the collection is empty, so its walk starts at the first memory.
        """
        now = self._clock()
        with self._catalog.write() as session:
            row = session.get(IndexRow, name)
            if row is None or anew:
                row = session.merge(
                    IndexRow(
                        name=name,
                        embedder=embedder,
                        dimension=dimension,
                        applied=_last_entry(session),
                        walked=0,
                        created_at=now,
                    )
                )
                session.flush()
            return _progress(row)

    @repeatable
    def forget_index(self, name: str) -> None:
        """A collection is gone: nothing waits for it, and vectors of its embedder are dropped."""
        with self._catalog.write() as session:
            row = session.get(IndexRow, name)
            if row is None:
                return
            embedder = row.embedder
            session.delete(row)
            session.flush()
            others = select(IndexRow.name).where(IndexRow.embedder == embedder)
            if session.scalar(others.limit(1)) is None:
                session.execute(delete(VectorRow).where(VectorRow.embedder == embedder))
            _prune(session)

    def index_agrees(self, name: str, *, points: int) -> bool:
        """Whether a collection that has been walked through may hold this many memories.

        What waits in the outbox may be in it or not; while a cube waits to go, any number may be
        right. Raises NotFound: no such collection.
        """
        with self._catalog.read() as session:
            waiting = OutboxRow.seq > _known(session, name).applied
            gone = select(OutboxRow.seq).where(waiting, OutboxRow.memory_seq.is_(None))
            if session.scalar(gone.limit(1)) is not None:
                return True
            active = select(func.count()).where(MemoryRow.state == MemoryState.ACTIVE)
            changing = select(func.count(OutboxRow.memory_seq.distinct())).where(waiting)
            off = abs((session.scalar(active) or 0) - points)
            return off <= (session.scalar(changing) or 0)

    def outbox(
        self, name: str, *, limit: int, after: int | None = None, cube_id: str | None = None
    ) -> list[OutboxEntry]:
        """The next changes that a collection has not followed, in order.

        Args:
            after: the entry that it has reached without having said so yet.
            cube_id: only changes of this cube.
        Raises:
            NotFound: no such collection.
        """
        with self._catalog.read() as session:
            applied = _known(session, name).applied
            waiting = (
                select(OutboxRow.seq, OutboxRow.cube_id, OutboxRow.memory_seq)
                .where(OutboxRow.seq > (applied if after is None else after))
                .order_by(OutboxRow.seq)
                .limit(limit)
            )
            if cube_id is not None:
                waiting = waiting.where(OutboxRow.cube_id == cube_id)
            return [
                OutboxEntry(seq, CubeId(cube), memory)
                for seq, cube, memory in session.execute(waiting)
            ]

    def catalog_uid(self) -> str:
        """What tells this catalog from others that share an index: 16 hex digits."""
        with self._catalog.read() as session:
            return session.scalars(select(IdentityRow.uid)).one()

    def newest_change(self) -> int:
        """The newest entry of the outbox, 0 when it is empty."""
        with self._catalog.read() as session:
            return session.scalar(select(func.max(OutboxRow.seq))) or 0

    def next_to_walk(self, name: str, *, limit: int, after: int | None = None) -> list[int]:
        """The next memories of a collection's first walk; none when it is over.

        Args:
            after: the memory that it has reached without having said so yet.
        Raises:
            NotFound: no such collection.
        """
        with self._catalog.read() as session:
            walked = _known(session, name).walked
            if walked is None:
                return []
            return list(
                session.scalars(
                    select(MemoryRow.seq)
                    .where(MemoryRow.seq > (walked if after is None else after))
                    .order_by(MemoryRow.seq)
                    .limit(limit)
                )
            )

    def memories_to_index(self, seqs: Sequence[int], *, embedder: str) -> list[MemoryToIndex]:
        """Those of `seqs` that are active now, with their stored vectors, by rising seq.

        Their edges, lineage and usage are left out: no index holds them.
        """
        with self._catalog.read() as session:
            rows = session.scalars(
                select(MemoryRow)
                .where(MemoryRow.seq.in_(seqs), MemoryRow.state == MemoryState.ACTIVE)
                .order_by(MemoryRow.seq)
            ).all()
            stored = {
                seq: (digest, vector)
                for seq, digest, vector in session.execute(
                    select(VectorRow.memory_seq, VectorRow.digest, VectorRow.vector).where(
                        VectorRow.memory_seq.in_(seqs), VectorRow.embedder == embedder
                    )
                )
            }
            return [
                MemoryToIndex(
                    row.seq,
                    to_memory(row, edges=(), lineage=Lineage(), usage=Usage()),
                    *stored.get(row.seq, (None, None)),
                )
                for row in rows
            ]

    @repeatable
    def keep_derived(self, derived: Sequence[DerivedMemory], *, embedder: str) -> None:
        """Keep vectors and entities; of memories that are gone by now nothing is kept."""
        if not derived:
            return
        with self._catalog.write() as session:
            alive = set(
                session.scalars(
                    select(MemoryRow.seq).where(MemoryRow.seq.in_([item.seq for item in derived]))
                )
            )
            vectors = [item for item in derived if item.seq in alive and item.vector is not None]
            _replace_vectors(session, vectors, embedder)
            _replace_entities(
                session,
                [item for item in derived if item.seq in alive and item.entities is not None],
            )

    @repeatable
    def advance_index(
        self, name: str, *, applied: int | None = None, walked: int | None = None
    ) -> None:
        """A collection has durably followed up to here; what nobody waits for is dropped.

        Raises:
            NotFound: no such collection.
        """
        with self._catalog.write() as session:
            row = _known(session, name)
            if applied is not None:
                row.applied = max(row.applied, applied)
            if walked is not None and row.walked is not None:
                row.walked = max(row.walked, walked)
            session.flush()
            _prune(session)

    @repeatable
    def end_walk(self, name: str) -> None:
        """A collection's first walk is over: it may answer searches. Raises NotFound."""
        with self._catalog.write() as session:
            _known(session, name).walked = None

    def index_backlog(
        self,
        name: str,
        *,
        cube_ids: Sequence[str] | None = None,
        labels: frozenset[str] | None = None,
        applied: int | None = None,
        up_to: int | None = None,
    ) -> IndexBacklog:
        """What a collection has still before it, of some cubes or of all.

        Args:
            labels: memories under any other label do not count.
            applied: the entry that it has reached without having said so yet.
            up_to: changes behind this entry do not count.
        """
        with self._catalog.read() as session:
            asked: dict[str, object] = {"name": name, "applied": applied, "up_to": up_to}
            if cube_ids is not None:
                asked["cubes"] = cube_ids
            if labels is not None:
                asked["labels"] = sorted(labels)
            statement = _backlog_of(cube_ids is not None, labels is not None)
            rows = statement.rows(session, asked)
        return IndexBacklog(*rows[0]) if rows else IndexBacklog(0, 0)

    @exactly_once
    def queue_reindex(self, actor: Principal, cube_id: str) -> Job:
        """Queue a job that has the index take in a cube again; one that waits is used again.

        Raises:
            NotFound: the cube.
        """
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.WRITE)
            row = queue_job(
                session,
                job_id=self._new_id("job"),
                cube_id=cube.row.id,
                kind=JobKind.REINDEX,
                payload={},
                actor=actor,
                at=now,
            )
            return to_job(row)

    @repeatable
    def reindex_cube(self, actor: Principal, cube_id: str) -> int:
        """Have the index drop a cube and take in each of its memories again.

        Returns:
            How many memories that is.
        Raises:
            NotFound: the cube.
        """
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.WRITE)
            seqs = session.scalars(
                select(MemoryRow.seq)
                .where(MemoryRow.cube_id == cube.row.id, MemoryRow.state == MemoryState.ACTIVE)
                .order_by(MemoryRow.seq)
            ).all()
            note_gone(session, cube.row.id)
            note_changed(session, cube.row.id, seqs)
            self._log(
                session,
                actor,
                "cube.reindex",
                cube_id=cube.row.id,
                details={"memories": len(seqs)},
                at=now,
            )
            return len(seqs)


@cache
def _backlog_of(some_cubes: bool, labelled: bool) -> Prepared:
    """Built once: every search asks."""
    given = {key: bindparam(key, type_=BigInteger) for key in ("applied", "up_to")}
    changes = (
        select(func.count())
        .select_from(OutboxRow)
        .where(OutboxRow.seq > func.coalesce(given["applied"], IndexRow.applied))
        .where(OutboxRow.seq <= func.coalesce(given["up_to"], OutboxRow.seq))
    )
    # None are beyond a walk that is over: its NULL compares with nothing.
    memories = select(func.count()).select_from(MemoryRow).where(MemoryRow.seq > IndexRow.walked)
    if some_cubes:
        changes = changes.where(one_of(OutboxRow.cube_id, "cubes"))
        memories = memories.where(one_of(MemoryRow.cube_id, "cubes"))
    if labelled:
        # What is gone altogether is not seen by anyone.
        changes = changes.join(MemoryRow, MemoryRow.seq == OutboxRow.memory_seq)
        changes = changes.where(~foreign_label())
        memories = memories.where(~foreign_label())
    return Prepared(
        select(
            changes.correlate(IndexRow).scalar_subquery(),
            memories.correlate(IndexRow).scalar_subquery(),
        ).where(IndexRow.name == bindparam("name"))
    )


def _known(session: Session, name: str) -> IndexRow:
    row = session.get(IndexRow, name)
    if row is None:
        raise NotFound("index", name)
    return row


def _progress(row: IndexRow) -> IndexProgress:
    return IndexProgress(
        name=row.name,
        embedder=row.embedder,
        dimension=row.dimension,
        applied=row.applied,
        walked=row.walked,
        created_at=row.created_at,
    )


def _last_entry(session: Session) -> int:
    """The newest number that the outbox has given out, and that no collection waits beyond."""
    newest = session.scalar(select(func.max(OutboxRow.seq))) or 0
    reached = session.scalar(select(func.max(IndexRow.applied))) or 0
    return max(newest, reached)


def _prune(session: Session) -> None:
    reached = session.scalar(select(func.min(IndexRow.applied)))
    if reached is not None:
        session.execute(delete(OutboxRow).where(OutboxRow.seq <= reached))


def _replace_vectors(session: Session, items: Sequence[DerivedMemory], embedder: str) -> None:
    if not items:
        return
    session.execute(
        delete(VectorRow).where(
            VectorRow.memory_seq.in_([item.seq for item in items]), VectorRow.embedder == embedder
        )
    )
    session.execute(
        insert(VectorRow),
        [
            {
                "memory_seq": item.seq,
                "embedder": embedder,
                "digest": item.digest,
                "vector": item.vector,
            }
            for item in items
        ],
    )


def _replace_entities(session: Session, items: Sequence[DerivedMemory]) -> None:
    if not items:
        return
    session.execute(delete(EntityRow).where(EntityRow.memory_seq.in_([item.seq for item in items])))
    rows = [
        {"cube_id": item.cube_id, "entity": entity, "memory_seq": item.seq}
        for item in items
        for entity in dict.fromkeys(item.entities or ())
    ]
    if rows:
        session.execute(insert(EntityRow), rows)
