"""How a memory is put down: its row, its version, its edges, and the words it is found by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from memos_vllm.control.access import OpenCube, open_memories, require_labels, visible
from memos_vllm.control.batches import in_parts
from memos_vllm.control.composition import mark_stale
from memos_vllm.control.indexing import note_changed
from memos_vllm.control.tables import (
    EdgeRow,
    LineageRow,
    MemoryLabelRow,
    MemoryRow,
    MemoryTagRow,
    MemoryVersionRow,
)
from memos_vllm.control.views import source_to_json
from memos_vllm.domain.access import Principal
from memos_vllm.domain.memory import (
    Edge,
    MemoryChange,
    MemoryPatch,
    MemoryState,
    NewMemory,
    Relation,
    Source,
    Tier,
)
from memos_vllm.domain.patch import UNSET
from memos_vllm.errors import InvalidRequest

Values = dict[str, Any]


def insert_memories(
    session: Session,
    cube: OpenCube,
    batch: Sequence[NewMemory],
    *,
    ids: Sequence[str],
    actor: Principal,
    reason: str | None,
    at: datetime,
) -> list[MemoryRow]:
    """Insert checked memories with first versions, tags, labels and edges, in order.

    Raises:
        NotFound: the target of an edge.
        InvalidRequest: a label that the actor does not hold.
    """
    for memory in batch:
        require_labels(cube, memory.labels)
    rows = [
        MemoryRow(
            id=memory_id,
            cube_id=cube.row.id,
            text=memory.text,
            text_bytes=len(memory.text.encode()),
            tags=list(memory.tags),
            labels=list(memory.labels),
            attributes=dict(memory.metadata),
            source=source_to_json(memory.source or Source()),
            state=MemoryState.ACTIVE,
            tier=Tier.PLAINTEXT,
            position=0,
            version=1,
            created_by=actor.id,
            created_at=at,
            updated_at=at,
            expires_at=memory.expires_at,
        )
        for memory_id, memory in zip(ids, batch, strict=True)
    ]
    session.add_all(rows)
    session.flush()
    _insert_versions(session, rows, MemoryChange.ADDED, actor=actor, reason=reason, at=at)
    _insert_words(session, rows)
    linked = [(row, memory.edges) for row, memory in zip(rows, batch, strict=True) if memory.edges]
    _insert_edges(session, cube, linked)
    note_changed(session, cube.row.id, [row.seq for row in rows])
    return rows


def record_versions(
    session: Session,
    cube: OpenCube,
    rows: Sequence[MemoryRow],
    change: MemoryChange,
    *,
    actor: Principal,
    reason: str | None,
    at: datetime,
) -> None:
    """Move the memories' versions, keep the new ones in their histories, and tell the index."""
    for row in rows:
        row.version += 1
        row.updated_at = at
    _insert_versions(session, rows, change, actor=actor, reason=reason, at=at)
    note_changed(session, cube.row.id, [row.seq for row in rows])


def apply_patch(row: MemoryRow, patch: MemoryPatch, *, edges: tuple[Edge, ...]) -> list[str]:
    """Put the given fields into the row; edges and words are left to `replace_*`.

    Args:
        edges: the memory's edges before the change.
    Returns:
        Names of the fields that differ from before, in a fixed order.
    """
    given: dict[str, tuple[str, object]] = {}
    if patch.text is not UNSET:
        given["text"] = ("text", patch.text)
    if patch.tags is not UNSET:
        given["tags"] = ("tags", list(patch.tags))
    if patch.labels is not UNSET:
        given["labels"] = ("labels", list(patch.labels))
    if patch.metadata is not UNSET:
        given["metadata"] = ("attributes", dict(patch.metadata))
    if patch.source is not UNSET:
        given["source"] = ("source", source_to_json(patch.source))
    if patch.expires_at is not UNSET:
        given["expires_at"] = ("expires_at", patch.expires_at)
    changed = []
    for field, (column, value) in given.items():
        if getattr(row, column) != value:
            setattr(row, column, value)
            changed.append(field)
    if "text" in changed:
        row.text_bytes = len(row.text.encode())
    if patch.edges is not UNSET and patch.edges != edges:
        changed.append("edges")
    return changed


def replace_edges(
    session: Session, cube: OpenCube, row: MemoryRow, edges: tuple[Edge, ...]
) -> None:
    """Give the memory these edges and no others, but for those to what the actor may not see.

    Raises NotFound, InvalidRequest.
    """
    seen = select(MemoryRow.seq).where(visible(cube))
    session.execute(
        delete(EdgeRow).where(EdgeRow.memory_seq == row.seq, EdgeRow.target_seq.in_(seen))
    )
    _insert_edges(session, cube, [(row, edges)])


def insert_lineage(session: Session, lines: Sequence[tuple[int, Relation, int]]) -> None:
    """Put lines of lineage down that are not there yet: of whom, how, and to whom.

    The newest version of each memory keeps them, too, for its history.
    """
    insert_rows(
        session,
        LineageRow,
        [
            {"memory_seq": seq, "relation": relation, "target_seq": target}
            for seq, relation, target in lines
        ],
    )
    targets = {target for _, _, target in lines}
    ids = {
        seq: memory_id
        for part in in_parts(targets)
        for seq, memory_id in session.execute(
            select(MemoryRow.seq, MemoryRow.id).where(MemoryRow.seq.in_(part))
        )
    }
    by_memory: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for seq, relation, target in lines:
        by_memory[seq][relation.value].append(ids[target])
    for seq, new in by_memory.items():
        newest = session.scalars(
            select(MemoryVersionRow)
            .where(MemoryVersionRow.memory_seq == seq)
            .order_by(MemoryVersionRow.version.desc())
            .limit(1)
        ).one()
        known = newest.lineage or {}
        newest.lineage = {
            relation: [*known.get(relation, ()), *new.get(relation, ())]
            for relation in {**known, **new}
        }
    session.flush()


def replace_words(session: Session, rows: Sequence[MemoryRow]) -> None:
    """Make the searchable tags and labels those of the rows."""
    for seqs in in_parts([row.seq for row in rows]):
        session.execute(delete(MemoryTagRow).where(MemoryTagRow.memory_seq.in_(seqs)))
        session.execute(delete(MemoryLabelRow).where(MemoryLabelRow.memory_seq.in_(seqs)))
    _insert_words(session, rows)


def relabel(session: Session, cube: OpenCube, rows: Sequence[MemoryRow]) -> None:
    """Other labels, another epoch: no KV made before is reachable; labelled text stays text.

    Raises:
        InvalidRequest: a label that the actor does not hold.
    """
    if not rows:
        return
    for row in rows:
        require_labels(cube, row.labels)
    cube.row.epoch += 1
    mark_stale(session, cube.row.id)
    for row in rows:
        if row.labels:
            row.tier, row.position = Tier.PLAINTEXT, 0


def insert_rows(session: Session, table: type[object], values: list[Values]) -> None:
    """Insert in one statement; none when there is nothing."""
    if values:
        session.execute(insert(table), values)


def _insert_versions(
    session: Session,
    rows: Iterable[MemoryRow],
    change: MemoryChange,
    *,
    actor: Principal,
    reason: str | None,
    at: datetime,
) -> None:
    values: list[Values] = [
        {
            "memory_seq": row.seq,
            "version": row.version,
            "text": row.text,
            "tags": row.tags,
            "labels": row.labels,
            "attributes": row.attributes,
            "source": row.source,
            "state": row.state,
            "expires_at": row.expires_at,
            "change": change,
            "reason": reason,
            "changed_by": actor.id,
            "changed_at": at,
        }
        for row in rows
    ]
    insert_rows(session, MemoryVersionRow, values)


def _insert_words(session: Session, rows: Iterable[MemoryRow]) -> None:
    tags: list[Values] = []
    labels: list[Values] = []
    for row in rows:
        tags += [{"cube_id": row.cube_id, "tag": tag, "memory_seq": row.seq} for tag in row.tags]
        labels += [{"memory_seq": row.seq, "label": label} for label in row.labels]
    insert_rows(session, MemoryTagRow, tags)
    insert_rows(session, MemoryLabelRow, labels)


def _insert_edges(
    session: Session, cube: OpenCube, linked: Sequence[tuple[MemoryRow, tuple[Edge, ...]]]
) -> None:
    wanted = list(dict.fromkeys(edge.target for _, edges in linked for edge in edges))
    found = open_memories(session, cube, list(wanted)) if wanted else []
    targets = {target.id: target.seq for target in found}
    values: list[Values] = []
    for row, edges in linked:
        if any(edge.target == row.id for edge in edges):
            raise InvalidRequest("a memory cannot have an edge to itself", param="edges")
        values += [
            {
                "memory_seq": row.seq,
                "kind": edge.kind,
                "target_seq": targets[edge.target],
                "weight": edge.weight,
                "rank": rank,
            }
            for rank, edge in enumerate(edges)
        ]
    insert_rows(session, EdgeRow, values)
