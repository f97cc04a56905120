"""What is worth keeping of one cube is taken over into another, with lineage."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from memos_vllm.control.access import OpenCube, open_cube, open_memories, visible
from memos_vllm.control.calls import exactly_once
from memos_vllm.control.composition import in_state
from memos_vllm.control.indexing import note_changed
from memos_vllm.control.memory_writes import insert_lineage, insert_memories
from memos_vllm.control.service import Service, bump
from memos_vllm.control.tables import LineageRow, MemoryRow
from memos_vllm.control.views import load_memories
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.lifecycle import state_at
from memos_vllm.domain.memory import (
    MAX_BATCH,
    Memory,
    MemoryState,
    NewMemory,
    Relation,
    checked_batch,
    validate_reason,
)
from memos_vllm.errors import Conflict, InvalidRequest


class KeepService(Service):
    """The part of `Mos` that takes memories over from cube to cube."""

    @exactly_once
    def keep_memories(
        self,
        actor: Principal,
        cube_id: str,
        *,
        from_cube: str,
        memory_ids: Sequence[str] | None,
        reason: str | None = None,
    ) -> list[Memory]:
        """Have a cube keep memories of another one, such as a session's; in one transaction.

        What is kept says the same under the same labels and tags, and is derived from its origin,
        so erasing that erases it, too. What the cube says already, word for word under the same
        labels, is not added again: its lineage then names the new origin as well.

        Args:
            memory_ids: active ones; every one that the actor may see when None.
        Returns:
            The cube's memories, in the order of their origins.
        Raises:
            NotFound: a cube, or a memory.
            Conflict: a memory is not active.
            InvalidRequest: both cubes are the same, or more than `MAX_BATCH` memories.
        """
        validate_reason(reason)
        if cube_id == from_cube:
            raise InvalidRequest("a cube has its own memories already", param="from")
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.WRITE)
            origin = open_cube(session, actor, from_cube, Access.READ)
            rows = _chosen(session, origin, memory_ids, now=now)
            known = _said_already(session, cube, rows, now=now)
            new = [row for row in rows if _key(row) not in known]
            new = list({_key(row): row for row in new}.values())
            batch = [_kept(memory) for memory in load_memories(session, origin, new)]
            added = insert_memories(
                session,
                cube,
                checked_batch(batch) if batch else [],
                ids=[self._new_id("mem") for _ in batch],
                actor=actor,
                reason=reason,
                at=now,
            )
            known |= {_key(row): row for row in added}
            lines = [(known[_key(row)].seq, Relation.DERIVED_FROM, row.seq) for row in rows]
            fresh = _new_lines(session, lines)
            insert_lineage(session, fresh)
            if not fresh:
                return load_memories(session, cube, _in_order(rows, known))
            note_changed(session, cube.cube_id, sorted({seq for seq, _, _ in fresh}))
            bump(cube.row, at=now)
            self._log(
                session,
                actor,
                "memory.keep",
                cube_id=cube.cube_id,
                details={
                    "from": origin.cube_id,
                    "origins": [row.id for row in rows],
                    "added": [row.id for row in added],
                    "version": cube.row.version,
                },
                at=now,
            )
            session.flush()
            return load_memories(session, cube, _in_order(rows, known))


def _chosen(
    session: Session, origin: OpenCube, memory_ids: Sequence[str] | None, *, now: datetime
) -> list[MemoryRow]:
    if memory_ids is None:
        wanted = select(MemoryRow).where(visible(origin), in_state(MemoryState.ACTIVE, now))
        rows = list(session.scalars(wanted.order_by(MemoryRow.seq).limit(MAX_BATCH + 1)))
    else:
        rows = open_memories(session, origin, list(dict.fromkeys(memory_ids))[: MAX_BATCH + 1])
    if len(rows) > MAX_BATCH:
        raise InvalidRequest(
            f"at most {MAX_BATCH} memories are kept at once; name them in memory_ids",
            param="memory_ids",
        )
    for row in rows:
        state = state_at(row.state, row.expires_at, now=now)
        if state is not MemoryState.ACTIVE:
            raise Conflict(f"memory '{row.id}' is {state.value}; only active ones are kept")
    return rows


def _key(row: MemoryRow) -> tuple[str, tuple[str, ...]]:
    return row.text, tuple(sorted(row.labels))


def _said_already(
    session: Session, cube: OpenCube, rows: Sequence[MemoryRow], *, now: datetime
) -> dict[tuple[str, tuple[str, ...]], MemoryRow]:
    """Active memories of the cube, which the actor may see, that say what one of `rows` says."""
    same = select(MemoryRow).where(
        visible(cube),
        in_state(MemoryState.ACTIVE, now),
        MemoryRow.text_bytes.in_(sorted({row.text_bytes for row in rows})),
        MemoryRow.text.in_([row.text for row in rows]),
    )
    return {_key(row): row for row in session.scalars(same.order_by(MemoryRow.seq.desc()))}


def _kept(memory: Memory) -> NewMemory:
    """Without edges: they lead to memories that are not here."""
    return NewMemory(
        text=memory.text,
        tags=memory.tags,
        labels=memory.labels,
        metadata=memory.metadata,
        source=memory.source,
        expires_at=memory.expires_at,
    )


def _new_lines(
    session: Session, lines: Sequence[tuple[int, Relation, int]]
) -> list[tuple[int, Relation, int]]:
    known = {
        (row.memory_seq, row.target_seq)
        for row in session.execute(
            select(LineageRow.memory_seq, LineageRow.target_seq).where(
                LineageRow.memory_seq.in_({seq for seq, _, _ in lines}),
                LineageRow.relation == Relation.DERIVED_FROM,
            )
        )
    }
    return [line for line in lines if (line[0], line[2]) not in known]


def _in_order(
    rows: Sequence[MemoryRow], known: dict[tuple[str, tuple[str, ...]], MemoryRow]
) -> list[MemoryRow]:
    return list({known[_key(row)].seq: known[_key(row)] for row in rows}.values())
