"""Several memories become one, with lineage both ways."""

from __future__ import annotations

from collections.abc import Sequence

from memos_vllm.control.access import open_cube, open_memories
from memos_vllm.control.calls import exactly_once
from memos_vllm.control.composition import mark_stale
from memos_vllm.control.memory_writes import insert_lineage, insert_memories, record_versions
from memos_vllm.control.service import Service, bump
from memos_vllm.control.views import load_memories
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.lifecycle import Verb, move
from memos_vllm.domain.memory import (
    Memory,
    MemoryChange,
    Relation,
    checked_batch,
    validate_reason,
)
from memos_vllm.domain.merge import check_parents, merged


class MergeService(Service):
    """The merge's part of `Mos`."""

    @exactly_once
    def merge_memories(
        self,
        actor: Principal,
        cube_id: str,
        memory_ids: Sequence[str],
        *,
        text: str | None = None,
        reason: str | None = None,
    ) -> Memory:
        """Put one new memory in the place of several; all in one transaction.

        The parents become `merged` and keep their text, history and labels; each leads to the new
        memory, which is derived from all of them. Restoring a parent takes it out again. A parent
        under fewer labels than the new one does not keep the reason.

        Args:
            text: what the new memory says; the parents' texts, one below the other, when absent.
        Returns:
            The new memory, in the plaintext tier, under every label of a parent.
        Raises:
            NotFound: the cube, or a parent.
            InvalidRequest: fewer than two parents, one twice, or too many.
            Conflict: a parent is not active.
            TooLarge: the text.
        """
        check_parents(memory_ids)
        validate_reason(reason)
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.WRITE)
            rows = open_memories(session, cube, list(memory_ids))
            for row in rows:
                row.state = move(
                    row.state, Verb.MERGE, memory_id=row.id, expires_at=row.expires_at, now=now
                )
            parents = load_memories(session, cube, rows)
            batch = checked_batch([merged(parents, text=text)])
            (new,) = insert_memories(
                session,
                cube,
                batch,
                ids=[self._new_id("mem")],
                actor=actor,
                reason=reason,
                at=now,
            )
            for row in rows:
                record_versions(
                    session,
                    cube,
                    [row],
                    MemoryChange.MERGED,
                    actor=actor,
                    # Why things under a label became one may say what they are.
                    reason=reason if set(row.labels) == set(new.labels) else None,
                    at=now,
                )
            insert_lineage(session, [(row.seq, Relation.MERGED_INTO, new.seq) for row in rows])
            insert_lineage(session, [(new.seq, Relation.DERIVED_FROM, row.seq) for row in rows])
            mark_stale(session, cube.row.id, memory_seqs=[row.seq for row in rows])
            bump(cube.row, at=now)
            self._log(
                session,
                actor,
                "memory.merge",
                cube_id=cube.row.id,
                subject=new.id,
                details={"parents": [row.id for row in rows], "version": cube.row.version},
                at=now,
            )
            session.flush()
            return load_memories(session, cube, [new])[0]
