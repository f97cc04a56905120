"""The rows of documents and of their chunks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from sqlalchemy import delete, insert, not_, select
from sqlalchemy.orm import Session

from memos_vllm.control.access import OpenCube, visible
from memos_vllm.control.document_upload import Upload, withheld_lines, without_lines
from memos_vllm.control.tables import (
    ChunkRow,
    DocumentRow,
    EdgeRow,
    MemoryRow,
    MemoryVersionRow,
)
from memos_vllm.domain.access import Role
from memos_vllm.domain.document import PART_OF, NewChunk
from memos_vllm.domain.memory import MemoryState
from memos_vllm.domain.turn import NEXT


def find_document(session: Session, cube: OpenCube, upload: Upload) -> DocumentRow | None:
    """The document with these bytes, or else with this name, of those that the actor sees."""
    documents = (
        select(DocumentRow)
        .join(MemoryRow, MemoryRow.seq == DocumentRow.memory_seq)
        .where(visible(cube), MemoryRow.state == MemoryState.ACTIVE)
        .order_by(DocumentRow.memory_seq)
        .limit(1)
    )
    named = session.scalar(documents.where(DocumentRow.uri == upload.uri))
    if named is not None:
        return named
    return session.scalar(documents.where(DocumentRow.digest == upload.document.digest))


def rename_document(known: DocumentRow, upload: Upload) -> bool:
    """Make the document's own row say what was uploaded; whether it said anything else."""
    document = upload.document
    now = (upload.uri, document.digest, document.media_type, document.size_bytes)
    before = (known.uri, known.digest, known.media_type, known.size_bytes)
    known.uri, known.digest, known.media_type, known.size_bytes = now
    return now != before


def chunk_rows(session: Session, document_seq: int) -> list[tuple[ChunkRow, MemoryRow]]:
    query = (
        select(ChunkRow, MemoryRow)
        .join(MemoryRow, MemoryRow.seq == ChunkRow.memory_seq)
        .where(ChunkRow.document_seq == document_seq)
        .order_by(ChunkRow.ordinal)
    )
    return [(chunk, memory) for chunk, memory in session.execute(query)]


def hidden_chunks(session: Session, cube: OpenCube, document_seq: int) -> set[int]:
    """The document's chunks that the actor may not see."""
    if cube.role is Role.OWNER:
        return set()
    query = (
        select(ChunkRow.memory_seq)
        .join(MemoryRow, MemoryRow.seq == ChunkRow.memory_seq)
        .where(ChunkRow.document_seq == document_seq, not_(visible(cube)))
    )
    return set(session.scalars(query))


def set_chunks(
    session: Session, document_seq: int, seqs: Sequence[int], chunks: Iterable[NewChunk]
) -> None:
    """Make these memories the document's chunks, in this order, with their edges."""
    former = select(ChunkRow.memory_seq).where(ChunkRow.document_seq == document_seq)
    for kind in (NEXT, PART_OF):
        session.execute(delete(EdgeRow).where(EdgeRow.memory_seq.in_(former), EdgeRow.kind == kind))
    session.execute(delete(ChunkRow).where(ChunkRow.document_seq == document_seq))
    session.execute(
        insert(ChunkRow),
        [
            {
                "memory_seq": seq,
                "document_seq": document_seq,
                "ordinal": ordinal,
                "digest": chunk.digest,
            }
            for ordinal, (seq, chunk) in enumerate(zip(seqs, chunks, strict=True))
        ],
    )
    edges = [
        {"memory_seq": seq, "kind": PART_OF, "target_seq": document_seq, "weight": 1.0, "rank": 0}
        for seq in seqs
    ]
    edges += [
        {"memory_seq": seq, "kind": NEXT, "target_seq": following, "weight": 1.0, "rank": 1}
        for seq, following in itertools.pairwise(seqs)
    ]
    session.execute(insert(EdgeRow), edges)


def withhold_headings(session: Session, cube: OpenCube, chunk: MemoryRow) -> MemoryRow | None:
    """Take headings that only stand over what is labelled out of the document's outline.

    Called when a chunk got other labels. Earlier versions of the outline lose them, too: an
    outline repeats what its chunks say, and these now say it under a label.

    Returns:
        The document's memory when it says less than before.
    """
    document = session.scalar(
        select(MemoryRow)
        .join(ChunkRow, ChunkRow.document_seq == MemoryRow.seq)
        .where(ChunkRow.memory_seq == chunk.seq)
    )
    if document is None:
        return None
    withheld = withheld_lines(
        document.labels,
        (
            (memory.labels, memory.attributes.get("heading_path") or ())
            for _, memory in chunk_rows(session, document.seq)
        ),
    )
    said = document.text
    document.text = without_lines(said, withheld)
    document.text_bytes = len(document.text.encode())
    versions = session.scalars(
        select(MemoryVersionRow).where(MemoryVersionRow.memory_seq == document.seq)
    )
    for version in versions:
        version.text = without_lines(version.text, withheld)
    session.flush()
    return document if document.text != said else None
