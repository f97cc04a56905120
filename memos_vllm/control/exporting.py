"""A cube as the records of an archive, as much of it as the caller may see."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import and_, select
from sqlalchemy.orm import Session

from memos_vllm.cartridge.layout import CubeFacts, Part
from memos_vllm.cartridge.records import (
    AuditRecord,
    ChunkRecord,
    DocumentRecord,
    EdgeRecord,
    LineageRecord,
    MemoryRecord,
    Record,
    SessionRecord,
    SourceRecord,
    VectorRecord,
    VersionRecord,
    encode,
)
from memos_vllm.control.access import OpenCube, open_cube, visible
from memos_vllm.control.calls import repeatable
from memos_vllm.control.service import Service
from memos_vllm.control.tables import (
    AuditRow,
    ChatSessionRow,
    ChunkRow,
    DocumentRow,
    EdgeRow,
    LineageRow,
    MemoryRow,
    MemoryUsageRow,
    MemoryVersionRow,
    VectorRow,
)
from memos_vllm.control.views import load_history, source_from_json
from memos_vllm.domain.access import Access, Principal, Role, sees_labels
from memos_vllm.domain.memory import MemoryVersion, Relation, Source

# Memories that are read at once; texts of 64 KiB make that 16 MiB.
_PAGE = 256
_STREAMED = {"yield_per": _PAGE}
_MAX_AUDIT = 10_000


@dataclass(frozen=True, slots=True)
class ExportHead:
    """What comes before the records; `whole` is whether the caller sees every memory."""

    facts: CubeFacts
    whole: bool


@dataclass(frozen=True, slots=True)
class ExportLines:
    """Some lines of a part; parts come in the archive's order."""

    part: Part
    lines: bytes
    count: int


class ExportService(Service):
    """The export's part of `Mos`."""

    def export_cube(self, actor: Principal, cube_id: str) -> Iterator[ExportHead | ExportLines]:
        """A cube in one state: memories in every state, their history, edges, lineage, documents,
        conversations, vectors, and for who may read it the newest 10,000 rows of its audit log.

        Memories under a label that the actor lacks are left out, and whatever names them.

        Raises:
            NotFound: the cube, with the first item.
        """
        with self._catalog.read() as session:
            cube = open_cube(session, actor, cube_id, Access.READ)
            yield ExportHead(facts_of(cube), cube.role is Role.OWNER)
            for part, records in records_of(session, cube):
                yield ExportLines(part, b"".join(map(encode, records)), len(records))
            if cube.role is Role.OWNER:
                rows = _audit(session, cube)
                yield ExportLines(Part.AUDIT, b"".join(map(encode, rows)), len(rows))

    @repeatable
    def note_export(self, actor: Principal, cube_id: str, *, memories: int, whole: bool) -> None:
        """Put into the audit log that a cube left the server. Raises NotFound."""
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.READ)
            self._log(
                session,
                actor,
                "cube.export",
                cube_id=cube.row.id,
                details={"memories": memories, "whole": whole, "version": cube.row.version},
                at=now,
            )


def facts_of(cube: OpenCube) -> CubeFacts:
    row = cube.row
    return CubeFacts(
        id=row.id,
        name=row.name,
        description=row.description,
        preamble=row.preamble,
        labels=tuple(row.labels),
        owner=row.owner,
        version=row.version,
        created_at=row.created_at,
    )


def records_of(session: Session, cube: OpenCube) -> Iterator[tuple[Part, Sequence[Record]]]:
    """Everything but the audit log, part by part, in lists of at most a few hundred."""
    for rows in _pages(session, cube):
        yield Part.MEMORIES, _memories(session, cube, rows)
    for read, part in (
        (_versions, Part.VERSIONS),
        (_edges, Part.EDGES),
        (_lineage, Part.LINEAGE),
        (_documents, Part.DOCUMENTS),
        (_chunks, Part.CHUNKS),
    ):
        for ids in _id_pages(session, cube):
            for records in read(session, cube, ids):
                yield part, records
    yield Part.SESSIONS, _sessions(session, cube)
    for ids in _id_pages(session, cube):
        yield Part.VECTORS, _vectors(session, ids)


def _pages(session: Session, cube: OpenCube) -> Iterator[Sequence[MemoryRow]]:
    last = 0
    while True:
        query = select(MemoryRow).where(visible(cube), MemoryRow.seq > last)
        rows = session.scalars(query.order_by(MemoryRow.seq).limit(_PAGE)).all()
        if not rows:
            return
        yield rows
        last = rows[-1].seq


def _id_pages(session: Session, cube: OpenCube) -> Iterator[dict[int, str]]:
    last = 0
    while True:
        query = select(MemoryRow.seq, MemoryRow.id).where(visible(cube), MemoryRow.seq > last)
        ids = dict(session.execute(query.order_by("seq").limit(_PAGE)).all())
        if not ids:
            return
        yield ids
        last = max(ids)


def _memories(session: Session, cube: OpenCube, rows: Sequence[MemoryRow]) -> list[Record]:
    versions = _shown_versions(session, cube, rows)
    used = {
        row.memory_seq: row
        for row in session.scalars(
            select(MemoryUsageRow).where(MemoryUsageRow.memory_seq.in_([row.seq for row in rows]))
        )
    }
    return [
        MemoryRecord(
            id=row.id,
            text=row.text,
            tags=tuple(row.tags),
            labels=tuple(row.labels),
            metadata=row.attributes,
            source=_source(source_from_json(row.source)),
            state=row.state,
            tier=row.tier,
            position=row.position,
            version=versions.get(row.seq, row.version),
            created_by=row.created_by,
            created_at=row.created_at,
            updated_at=row.updated_at,
            expires_at=row.expires_at,
            hits=used[row.seq].hits if row.seq in used else 0,
            last_used_at=used[row.seq].last_used_at if row.seq in used else None,
        )
        for row in rows
    ]


def _shown_versions(session: Session, cube: OpenCube, rows: Sequence[MemoryRow]) -> dict[int, int]:
    """How many versions of each memory the actor may see, where it may not see all."""
    if cube.role is Role.OWNER:
        return {}
    query = select(MemoryVersionRow.memory_seq, MemoryVersionRow.labels).where(
        MemoryVersionRow.memory_seq.in_([row.seq for row in rows])
    )
    return Counter(
        seq for seq, labels in session.execute(query) if sees_labels(cube.role, cube.labels, labels)
    )


def _versions(session: Session, cube: OpenCube, ids: dict[int, str]) -> Iterator[Sequence[Record]]:
    """What of each history the actor may see, numbered anew: a gap would tell of the rest."""
    query = (
        select(MemoryVersionRow)
        .where(MemoryVersionRow.memory_seq.in_(ids))
        .order_by(MemoryVersionRow.memory_seq, MemoryVersionRow.version)
    )
    records: list[Record] = []
    rows = session.scalars(query, execution_options=_STREAMED)
    for seq, history in itertools.groupby(rows, key=lambda row: row.memory_seq):
        shown = load_history(session, cube, ids[seq], list(history))
        records += [_to_record(version, number) for number, version in enumerate(shown, start=1)]
        if len(records) >= _PAGE:
            yield records
            records = []
    yield records


def _to_record(version: MemoryVersion, number: int) -> VersionRecord:
    lineage = {
        Relation.DERIVED_FROM: version.lineage.derived_from,
        Relation.MERGED_INTO: (version.lineage.merged_into,) if version.lineage.merged_into else (),
        Relation.SUPERSEDES: version.lineage.supersedes,
    }
    return VersionRecord(
        memory_id=version.memory_id,
        version=number,
        text=version.text,
        tags=version.tags,
        labels=version.labels,
        metadata=dict(version.metadata),
        source=_source(version.source),
        state=version.state,
        expires_at=version.expires_at,
        change=version.change,
        reason=version.reason,
        changed_by=version.changed_by,
        changed_at=version.changed_at,
        lineage={relation: named for relation, named in lineage.items() if named},
    )


def _source(source: Source) -> SourceRecord:
    return SourceRecord(
        kind=source.kind,
        uri=source.uri,
        title=source.title,
        author=source.author,
        created_at=source.created_at,
        locator=source.locator,
    )


def _edges(session: Session, cube: OpenCube, ids: dict[int, str]) -> Iterator[Sequence[Record]]:
    query = (
        select(EdgeRow, MemoryRow.id)
        .join(MemoryRow, MemoryRow.seq == EdgeRow.target_seq)
        .where(EdgeRow.memory_seq.in_(ids), visible(cube, by_number=True))
        .order_by(EdgeRow.memory_seq, EdgeRow.rank)
    )
    records: list[Record] = []
    rows = session.execute(query, execution_options=_STREAMED)
    for seq, edges in itertools.groupby(rows, key=lambda row: row[0].memory_seq):
        shown = list(edges)
        # Numbered anew, since a gap would tell of an edge to something hidden.
        ranks = {rank: new for new, rank in enumerate(sorted({edge.rank for edge, _ in shown}))}
        records += [
            EdgeRecord(
                memory_id=ids[seq],
                kind=edge.kind,
                target=target,
                weight=edge.weight,
                rank=ranks[edge.rank],
            )
            for edge, target in shown
        ]
        if len(records) >= _PAGE:
            yield records
            records = []
    yield records


def _lineage(session: Session, cube: OpenCube, ids: dict[int, str]) -> Iterator[Sequence[Record]]:
    query = (
        select(LineageRow, MemoryRow.id)
        .join(MemoryRow, MemoryRow.seq == LineageRow.target_seq)
        .where(LineageRow.memory_seq.in_(ids), visible(cube, by_number=True))
        .order_by(LineageRow.memory_seq, LineageRow.target_seq)
    )
    for rows in session.execute(query, execution_options=_STREAMED).partitions():
        yield [
            LineageRecord(memory_id=ids[line.memory_seq], relation=line.relation, target=target)
            for line, target in rows
        ]


def _documents(
    session: Session, _cube: OpenCube, ids: dict[int, str]
) -> Iterator[Sequence[Record]]:
    query = select(DocumentRow).where(DocumentRow.memory_seq.in_(ids))
    yield [
        DocumentRecord(
            memory_id=ids[row.memory_seq],
            uri=row.uri,
            digest=row.digest,
            media_type=row.media_type,
            size_bytes=row.size_bytes,
        )
        for row in session.scalars(query.order_by(DocumentRow.memory_seq))
    ]


def _chunks(session: Session, cube: OpenCube, ids: dict[int, str]) -> Iterator[Sequence[Record]]:
    query = (
        select(ChunkRow, MemoryRow.id)
        .join(MemoryRow, MemoryRow.seq == ChunkRow.document_seq)
        .where(ChunkRow.memory_seq.in_(ids), visible(cube, by_number=True))
        .order_by(ChunkRow.memory_seq)
    )
    yield [
        ChunkRecord(
            memory_id=ids[row.memory_seq],
            document_id=document_id,
            ordinal=row.ordinal,
            digest=row.digest,
        )
        for row, document_id in session.execute(query)
    ]


def _sessions(session: Session, cube: OpenCube) -> list[Record]:
    last_turn = and_(MemoryRow.seq == ChatSessionRow.last_memory_seq, visible(cube, by_number=True))
    query = (
        select(ChatSessionRow, MemoryRow.id)
        # One whose last turn is gone, or hidden, is nobody's business but the owner's.
        .join(MemoryRow, last_turn, isouter=cube.role is Role.OWNER)
        .where(ChatSessionRow.cube_id == cube.row.id)
        .order_by(ChatSessionRow.session_id, ChatSessionRow.label_set)
    )
    return [
        SessionRecord(
            session_id=row.session_id,
            labels=tuple(row.labels),
            turns=row.turns,
            last_memory_id=last,
        )
        for row, last in session.execute(query)
        if sees_labels(cube.role, cube.labels, row.labels)
    ]


def _vectors(session: Session, ids: dict[int, str]) -> list[Record]:
    query = select(VectorRow).where(VectorRow.memory_seq.in_(ids))
    return [
        VectorRecord(
            memory_id=ids[row.memory_seq],
            embedder=row.embedder,
            digest=row.digest,
            vector=row.vector,
        )
        for row in session.scalars(query.order_by(VectorRow.memory_seq, VectorRow.embedder))
    ]


def _audit(session: Session, cube: OpenCube) -> list[Record]:
    newest = select(AuditRow).where(AuditRow.cube_id == cube.row.id).order_by(AuditRow.seq.desc())
    return [
        AuditRecord(
            seq=row.seq,
            at=row.at,
            actor=row.actor,
            action=row.action,
            subject=row.subject,
            details=json.loads(row.details),
            previous_hash=row.previous_hash,
            hash=row.hash,
        )
        for row in reversed(session.scalars(newest.limit(_MAX_AUDIT)).all())
    ]
