"""Documents: taken in as memories, and changed where they changed when they come again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from memos_vllm.control.access import OpenCube, open_cube
from memos_vllm.control.batches import in_parts
from memos_vllm.control.calls import exactly_once
from memos_vllm.control.composition import mark_stale
from memos_vllm.control.document_rows import (
    chunk_rows,
    find_document,
    hidden_chunks,
    rename_document,
    set_chunks,
)
from memos_vllm.control.document_upload import Upload, checked_upload, withheld_lines, without_lines
from memos_vllm.control.memory_writes import (
    apply_patch,
    insert_memories,
    record_versions,
    relabel,
    replace_words,
)
from memos_vllm.control.service import Service, bump
from memos_vllm.control.tables import ChunkRow, DocumentRow, MemoryRow
from memos_vllm.control.views import load_memories
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.checks import JsonObject
from memos_vllm.domain.document import DocumentOutcome, NewDocument, StoredDocument
from memos_vllm.domain.memory import (
    MAX_BATCH,
    MemoryChange,
    MemoryPatch,
    MemoryState,
    NewMemory,
    validate_reason,
)
from memos_vllm.domain.revision import KnownChunk, diff_chunks


@dataclass(frozen=True, slots=True)
class _By:
    """Who changes memories, why and when."""

    actor: Principal
    reason: str | None
    at: datetime

    def record(
        self, session: Session, cube: OpenCube, rows: Sequence[MemoryRow], change: MemoryChange
    ) -> None:
        record_versions(
            session, cube, rows, change, actor=self.actor, reason=self.reason, at=self.at
        )


class DocumentService(Service):
    """The documents' part of `Mos`."""

    @exactly_once
    def put_document(
        self,
        actor: Principal,
        cube_id: str,
        document: NewDocument,
        *,
        uri: str,
        tags: Sequence[str] = (),
        labels: Sequence[str] = (),
        metadata: JsonObject | None = None,
        reason: str | None = None,
    ) -> StoredDocument:
        """Take in a document, or bring one that is known up to date; in one transaction.

        Known is what has the same `uri`, or else the same bytes. Of a known document the chunks
        that say the same stay as they are, those that were edited get a new version, new ones
        are added, and those that are gone are archived. A chunk under a label that the actor lacks
        stays as it is while the document says it, and is not in the answer.

        Raises:
            NotFound: the cube.
            InvalidRequest, TooLarge: a field, or a document without chunks.
        """
        validate_reason(reason)
        upload = checked_upload(
            document, uri=uri, tags=tags, labels=labels, metadata=metadata or {}
        )
        now = self._clock()
        by = _By(actor, reason, now)
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.WRITE)
            known = find_document(session, cube, upload)
            hidden = set[int]() if known is None else hidden_chunks(session, cube, known.memory_seq)
            if known is None:
                change = self._add(session, cube, upload, by)
            elif known.digest == document.digest and not upload.says_more:
                change = _Change(known.memory_seq)
            else:
                change = self._revise(session, cube, known, upload, by, hidden=hidden)
            if change.touched:
                bump(cube.row, at=now, rescope=change.relabelled)
                self._log(
                    session,
                    actor,
                    "document.put",
                    cube_id=cube.row.id,
                    subject=session.get_one(MemoryRow, change.document_seq).id,
                    # No digest: it could not be erased from here.
                    details={
                        "chunks": len(document.chunks),
                        "added": change.added,
                        "changed": change.changed,
                        "archived": change.archived,
                        "version": cube.row.version,
                    },
                    at=now,
                )
            outcome = DocumentOutcome.ADDED if known is None else DocumentOutcome.UPDATED
            if known is not None and not change.any:
                outcome = DocumentOutcome.UNCHANGED
            stored = _stored(session, cube, outcome, change, hidden=hidden)
            if not change.touched:
                given = (stored.document, *stored.memories)
                self._log_read(session, actor.id, cube.cube_id, given)
            return stored

    def _add(self, session: Session, cube: OpenCube, upload: Upload, by: _By) -> _Change:
        whole, *pieces = self._insert(session, cube, [upload.whole, *upload.pieces], by)
        session.add(
            DocumentRow(
                memory_seq=whole.seq,
                cube_id=cube.row.id,
                uri=upload.uri,
                digest=upload.document.digest,
                media_type=upload.document.media_type,
                size_bytes=upload.document.size_bytes,
            )
        )
        session.flush()
        set_chunks(session, whole.seq, [row.seq for row in pieces], upload.document.chunks)
        return _Change(whole.seq, added=len(pieces), touched=True)

    def _revise(
        self,
        session: Session,
        cube: OpenCube,
        known: DocumentRow,
        upload: Upload,
        by: _By,
        *,
        hidden: Collection[int],
    ) -> _Change:
        old = chunk_rows(session, known.memory_seq)
        # What the actor may not see is known by its digest only: comparing texts would tell of it.
        plan = diff_chunks(
            [KnownChunk(chunk.digest, "" if row.seq in hidden else row.text) for chunk, row in old],
            upload.document.chunks,
        )
        seqs: dict[int, int] = {}
        brought = _Brought()
        edited = set(plan.edited)
        for pair in (*plan.kept, *plan.edited):
            row = old[pair.old][1]
            seqs[pair.new] = row.seq
            if row.seq in hidden:
                continue
            # What someone wrote into a chunk stays, as long as the document says the same there.
            patch = upload.patch(
                upload.pieces[pair.new], known=row.attributes, with_text=pair in edited
            )
            brought.bring(row, patch)
        changed = list(brought.rows)
        gone = [old[index][1] for index in plan.gone]
        gone = [row for row in gone if row.state is MemoryState.ACTIVE]
        for row in gone:
            row.state = MemoryState.ARCHIVED
        by.record(session, cube, gone, MemoryChange.ARCHIVED)
        whole = session.get_one(MemoryRow, known.memory_seq)
        new = [
            upload.joining(
                upload.pieces[index], tags=whole.tags, labels=whole.labels, known=whole.attributes
            )
            for index in plan.added
        ]
        added = self._insert(session, cube, new, by)
        seqs |= {index: row.seq for index, row in zip(plan.added, added, strict=True)}
        by_seq = {row.seq: row for row in (*(row for _, row in old), *added)}
        withheld = withheld_lines(
            upload.labels or whole.labels,
            (
                (by_seq[seqs[index]].labels, chunk.heading_path)
                for index, chunk in enumerate(upload.document.chunks)
            ),
        )
        outline = replace(upload.whole, text=without_lines(upload.whole.text, withheld))
        patch = upload.patch(outline, known=whole.attributes, with_text=True)
        renewed = brought.bring(whole, patch)
        brought.write(session, cube, by)
        ordered = [seqs[index] for index in range(len(upload.document.chunks))]
        moved = bool(plan.edited) or ordered != [row.seq for _, row in old]
        if moved:
            set_chunks(session, whole.seq, ordered, upload.document.chunks)
        if renewed or changed or gone:
            touched = [row.seq for row in (*changed, *gone, whole)]
            for part in in_parts(touched):
                mark_stale(session, cube.row.id, memory_seqs=part)
        renamed = rename_document(known, upload)
        return _Change(
            whole.seq,
            added=len(added),
            changed=len(changed),
            archived=sum(row.seq not in hidden for row in gone),
            relabelled=bool(brought.relabelled),
            touched=bool(moved or renamed or renewed or changed or gone),
        )

    def _insert(
        self,
        session: Session,
        cube: OpenCube,
        memories: Sequence[NewMemory],
        by: _By,
    ) -> list[MemoryRow]:
        if not memories:
            return []
        return insert_memories(
            session,
            cube,
            memories,
            ids=[self._new_id("mem") for _ in memories],
            actor=by.actor,
            reason=by.reason,
            at=by.at,
        )


@dataclass(frozen=True, slots=True)
class _Change:
    """How many chunks were added, given a new version, and archived.

    `touched` is whether anything of the document is another than before.
    """

    document_seq: int
    added: int = 0
    changed: int = 0
    archived: int = 0
    relabelled: bool = False
    touched: bool = False

    @property
    def any(self) -> bool:
        return bool(self.added or self.changed or self.archived)


@dataclass(slots=True)
class _Brought:
    """Memories that were brought to what was read now, to be written down together."""

    rows: list[MemoryRow] = field(default_factory=list)
    reworded: list[MemoryRow] = field(default_factory=list)
    relabelled: list[MemoryRow] = field(default_factory=list)

    def bring(self, row: MemoryRow, patch: MemoryPatch) -> bool:
        """Change a memory, unless its owner has archived it; whether that changed anything."""
        if row.state is not MemoryState.ACTIVE:
            return False
        fields = apply_patch(row, patch, edges=())
        if not fields:
            return False
        self.rows.append(row)
        if "tags" in fields or "labels" in fields:
            self.reworded.append(row)
        if "labels" in fields:
            self.relabelled.append(row)
        return True

    def write(self, session: Session, cube: OpenCube, by: _By) -> None:
        """Write their tags, labels and versions."""
        replace_words(session, self.reworded)
        relabel(session, cube, self.relabelled)
        by.record(session, cube, self.rows, MemoryChange.EDITED)


def _stored(
    session: Session,
    cube: OpenCube,
    outcome: DocumentOutcome,
    change: _Change,
    *,
    hidden: Collection[int],
) -> StoredDocument:
    row = session.get_one(DocumentRow, change.document_seq)
    in_order = session.scalars(
        select(ChunkRow.memory_seq)
        .where(ChunkRow.document_seq == row.memory_seq)
        .order_by(ChunkRow.ordinal)
    )
    seqs = [seq for seq in in_order if seq not in hidden]
    shown = [row.memory_seq, *seqs[:MAX_BATCH]]
    rows = {
        memory.seq: memory
        for memory in session.scalars(select(MemoryRow).where(MemoryRow.seq.in_(shown)))
    }
    document, *memories = load_memories(session, cube, [rows[seq] for seq in shown])
    return StoredDocument(
        document=document,
        outcome=outcome,
        digest=row.digest,
        media_type=row.media_type,
        memories=tuple(memories),
        chunks=len(seqs),
        added=change.added,
        changed=change.changed,
        archived=change.archived,
    )
