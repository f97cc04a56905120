"""Puts the records of an archive, or of another cube, into a new cube."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from memos_vllm.cartridge.layout import Part
from memos_vllm.cartridge.records import (
    MemoryRecord,
    Record,
    SessionRecord,
    VectorRecord,
    VersionRecord,
)
from memos_vllm.control.access import OpenCube
from memos_vllm.control.indexing import note_changed
from memos_vllm.control.memory_writes import Values, insert_rows
from memos_vllm.control.tables import (
    ChatSessionRow,
    ChunkRow,
    DocumentRow,
    EdgeRow,
    IndexRow,
    LineageRow,
    MemoryLabelRow,
    MemoryRow,
    MemoryTagRow,
    MemoryUsageRow,
    MemoryVersionRow,
    VectorRow,
)
from memos_vllm.control.turns import label_set_of
from memos_vllm.control.views import source_to_json
from memos_vllm.domain.lineage import has_circle
from memos_vllm.domain.memory import MAX_EDGES, NewMemory, Relation, Source
from memos_vllm.errors import InvalidRequest

# Documents and conversations link a memory beside what its author did.
_MAX_EDGES = MAX_EDGES + 16
# What the vector was made of; behind it stands what entities were found in, which are found anew.
_TEXT_DIGEST_BYTES = 24
_NO_ENTITIES = bytes(8)

Seqs = dict[str, int]


class CubeLoader:
    """Fills a cube that is still empty, in one session. Give the parts in the archive's order.

    Args:
        new_id: the id that a memory gets here, from the one it had.
        with_vectors: keep vectors of embedders that are in use here; the others are left out.
    Attributes:
        memories: how many were put in.
    """

    def __init__(
        self,
        session: Session,
        cube: OpenCube,
        *,
        new_id: Callable[[str], str],
        with_vectors: bool = True,
    ) -> None:
        self.memories = 0
        self._session = session
        self._cube_id = cube.row.id
        self._new_id = new_id
        self._embedders: set[tuple[str, int]] = set()
        if with_vectors:
            found = session.execute(select(IndexRow.embedder, IndexRow.dimension))
            self._embedders = {(embedder, dimension) for embedder, dimension in found}

    def load(self, part: Part, records: Sequence[Record]) -> None:
        """Insert checked records of one part.

        Raises:
            InvalidRequest: one of them names a memory that is not in this cube.
            IntegrityError: two of them say the same.
        """
        if part is Part.AUDIT:
            # What happened elsewhere is for people to read; the log here tells of here.
            return
        if part is Part.MEMORIES:
            self._load_memories([it for it in records if isinstance(it, MemoryRecord)])
            return
        if part is Part.VECTORS:
            records = [it for it in records if isinstance(it, VectorRecord) and self._usable(it)]
        seqs = self._seqs(name for record in records for name in _named(record))
        values = [_values(record, seqs, self._new_id) for record in records]
        if part in _OF_A_CUBE:
            values = [{**row, "cube_id": self._cube_id} for row in values]
        insert_rows(self._session, _TABLES[part], values)

    def finish(self) -> None:
        """Check what only the whole shows.

        Raises:
            InvalidRequest: a history with holes, or that ends otherwise than the memory is;
                lineage that leads back to where it began; too many edges of one memory.
        """
        self._check_histories()
        self._check_lineage()
        crowded = (
            select(EdgeRow.memory_seq)
            .join(MemoryRow, MemoryRow.seq == EdgeRow.memory_seq)
            .where(MemoryRow.cube_id == self._cube_id)
            .group_by(EdgeRow.memory_seq)
            .having(func.count() > _MAX_EDGES)
        )
        if self._session.scalar(crowded.limit(1)) is not None:
            raise InvalidRequest(f"a memory has more than {MAX_EDGES} edges")

    def _load_memories(self, records: Sequence[MemoryRecord]) -> None:
        contents = [record.content() for record in records]
        insert_rows(
            self._session,
            MemoryRow,
            [
                {
                    **_content(content),
                    "id": self._new_id(record.id),
                    "cube_id": self._cube_id,
                    "text_bytes": len(content.text.encode()),
                    "state": record.state,
                    "tier": record.tier,
                    "position": record.position,
                    "version": record.version,
                    "created_by": record.created_by,
                    "created_at": record.created_at,
                    "updated_at": record.updated_at,
                }
                for record, content in zip(records, contents, strict=True)
            ],
        )
        seqs = self._seqs(record.id for record in records)
        by_seq = list(zip([seqs[record.id] for record in records], contents, strict=True))
        insert_rows(
            self._session,
            MemoryTagRow,
            [
                {"cube_id": self._cube_id, "tag": tag, "memory_seq": seq}
                for seq, content in by_seq
                for tag in content.tags
            ],
        )
        insert_rows(
            self._session,
            MemoryLabelRow,
            [
                {"memory_seq": seq, "label": label}
                for seq, content in by_seq
                for label in content.labels
            ],
        )
        insert_rows(
            self._session,
            MemoryUsageRow,
            [
                {
                    "memory_seq": seqs[record.id],
                    "hits": record.hits,
                    "last_used_at": record.last_used_at,
                }
                for record in records
                if record.hits
            ],
        )
        note_changed(self._session, self._cube_id, list(seqs.values()))
        self.memories += len(records)

    def _usable(self, record: VectorRecord) -> bool:
        dimension, odd = divmod(len(record.vector), 2)
        if odd or (record.embedder, dimension) not in self._embedders:
            return False
        return all(map(math.isfinite, struct.unpack(f"<{dimension}e", record.vector)))

    def _seqs(self, former_ids: Iterable[str]) -> Seqs:
        """The rows of memories of this cube, by the ids that they had before."""
        new_ids = {former: self._new_id(former) for former in former_ids}
        rows = self._session.execute(
            select(MemoryRow.id, MemoryRow.seq).where(
                MemoryRow.id.in_(set(new_ids.values())), MemoryRow.cube_id == self._cube_id
            )
        )
        found: Seqs = dict(rows.all())
        if len(found) < len(set(new_ids.values())):
            raise InvalidRequest("the archive names a memory that it does not hold")
        return {former: found[new] for former, new in new_ids.items()}

    def _check_histories(self) -> None:
        counted = (
            select(
                MemoryVersionRow.memory_seq,
                func.count().label("number"),
                func.max(MemoryVersionRow.version).label("newest"),
            )
            .join(MemoryRow, MemoryRow.seq == MemoryVersionRow.memory_seq)
            .where(MemoryRow.cube_id == self._cube_id)
            .group_by(MemoryVersionRow.memory_seq)
            .subquery()
        )
        here = MemoryRow.cube_id == self._cube_id
        with_holes = (
            select(MemoryRow.seq)
            .outerjoin(counted, counted.c.memory_seq == MemoryRow.seq)
            .where(
                here,
                or_(
                    counted.c.number.is_(None),
                    counted.c.number != MemoryRow.version,
                    counted.c.newest != MemoryRow.version,
                ),
            )
        )
        ends_otherwise = (
            select(MemoryRow.seq)
            .join(
                MemoryVersionRow,
                (MemoryVersionRow.memory_seq == MemoryRow.seq)
                & (MemoryVersionRow.version == MemoryRow.version),
            )
            .where(
                here,
                or_(
                    MemoryVersionRow.text != MemoryRow.text,
                    MemoryVersionRow.state != MemoryRow.state,
                ),
            )
        )
        for wrong in (with_holes, ends_otherwise):
            if self._session.scalar(wrong.limit(1)) is not None:
                raise InvalidRequest("the history of a memory does not lead to what it is now")

    def _check_lineage(self) -> None:
        for relation in Relation:
            lines = self._session.execute(
                select(LineageRow.memory_seq, LineageRow.target_seq)
                .join(MemoryRow, MemoryRow.seq == LineageRow.memory_seq)
                .where(MemoryRow.cube_id == self._cube_id, LineageRow.relation == relation)
                .execution_options(yield_per=1000)
            )
            if has_circle((origin, target) for origin, target in lines):
                raise InvalidRequest("the lineage of a memory leads back to itself")


_TABLES: dict[Part, type[object]] = {
    Part.VERSIONS: MemoryVersionRow,
    Part.EDGES: EdgeRow,
    Part.LINEAGE: LineageRow,
    Part.DOCUMENTS: DocumentRow,
    Part.CHUNKS: ChunkRow,
    Part.SESSIONS: ChatSessionRow,
    Part.VECTORS: VectorRow,
}
_OF_A_CUBE = frozenset({Part.DOCUMENTS, Part.SESSIONS})
# Fields of records that name a memory, and the columns that hold its row.
_NAMES = {
    "memory_id": "memory_seq",
    "target": "target_seq",
    "document_id": "document_seq",
    "last_memory_id": "last_memory_seq",
}


def _named(record: Record) -> Iterator[str]:
    """The memories that a record names."""
    if isinstance(record, VersionRecord):
        yield from itertools.chain.from_iterable(record.lineage.values())
    for field in _NAMES:
        name = getattr(record, field, None)
        if name is not None:
            yield name


def _values(record: Record, seqs: Seqs, new_id: Callable[[str], str]) -> Values:
    """A record as a row: what it names by number, all else as it is."""
    fields = dict(record)
    if isinstance(record, VersionRecord):
        for field in ("text", "tags", "labels", "metadata", "source", "expires_at"):
            del fields[field]
        fields |= _content(record.content())
        fields["lineage"] = {
            relation.value: [new_id(name) for name in named]
            for relation, named in record.lineage.items()
        } or None
    if isinstance(record, SessionRecord):
        fields["labels"] = sorted(record.labels)
        fields["label_set"] = label_set_of(record.labels)
    if isinstance(record, VectorRecord):
        fields["digest"] = record.digest[:_TEXT_DIGEST_BYTES] + _NO_ENTITIES
    for field, column in _NAMES.items():
        if field in fields:
            name = fields.pop(field)
            fields[column] = None if name is None else seqs[name]
    return fields


def _content(content: NewMemory) -> Values:
    return {
        "text": content.text,
        "tags": list(content.tags),
        "labels": list(content.labels),
        "attributes": dict(content.metadata),
        "source": source_to_json(content.source or Source()),
        "expires_at": content.expires_at,
    }
