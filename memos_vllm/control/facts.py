"""Facts that were read out of turns, with their lineage."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from memos_vllm.control.access import open_cube, open_memories, visible
from memos_vllm.control.calls import exactly_once
from memos_vllm.control.indexing import note_changed
from memos_vllm.control.memory_writes import insert_lineage, insert_memories
from memos_vllm.control.service import Service, bump
from memos_vllm.control.tables import LineageRow, MemoryRow
from memos_vllm.control.views import load_memories
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.fact import FACT_KIND, NewFact
from memos_vllm.domain.memory import Memory, NewMemory, Relation, Source, checked_batch


class FactService(Service):
    """The facts' part of `Mos`."""

    @exactly_once
    def add_facts(
        self, actor: Principal, cube_id: str, facts: Sequence[NewFact], *, turn_ids: Sequence[str]
    ) -> list[Memory]:
        """Keep facts as memories that stem from turns; all or none.

        An earlier fact that a new one contradicts keeps its text and state, and is marked by the
        new one's lineage. Doing this again with the same facts and turns adds nothing.

        Raises:
            NotFound: the cube, a turn, or an earlier fact.
            InvalidRequest, TooLarge: a fact's text.
        """
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.WRITE)
            turns = open_memories(session, cube, list(turn_ids))
            origins = [turn.seq for turn in turns]
            known = set(
                session.scalars(
                    select(MemoryRow.text)
                    .join(LineageRow, LineageRow.memory_seq == MemoryRow.seq)
                    .where(
                        visible(cube),
                        LineageRow.relation == Relation.DERIVED_FROM,
                        LineageRow.target_seq.in_(origins),
                    )
                )
            )
            new = [fact for fact in facts if fact.same_as is None and fact.text not in known]
            again = []
            for same_as in dict.fromkeys(fact.same_as for fact in facts):
                if same_as is None:
                    continue
                (earlier,) = open_memories(session, cube, [same_as])
                if _relate(session, earlier.seq, Relation.DERIVED_FROM, origins):
                    note_changed(session, cube.row.id, [earlier.seq])
                    again.append(earlier.id)
            if not new and not again:
                return []
            labels = tuple(dict.fromkeys(label for turn in turns for label in turn.labels))
            said_at = max((turn.created_at for turn in turns), default=now)
            batch = [
                NewMemory(
                    text=fact.text,
                    # What may be seen of a turn by its labels, no more of what it says.
                    labels=labels,
                    source=Source(kind=FACT_KIND, created_at=said_at),
                )
                for fact in new
            ]
            rows = insert_memories(
                session,
                cube,
                checked_batch(batch) if batch else [],
                ids=[self._new_id("mem") for _ in batch],
                actor=actor,
                reason="read out of a conversation",
                at=now,
            )
            for row, fact in zip(rows, new, strict=True):
                _relate(session, row.seq, Relation.DERIVED_FROM, origins)
                older = open_memories(session, cube, list(fact.supersedes))
                _relate(session, row.seq, Relation.SUPERSEDES, [memory.seq for memory in older])
            bump(cube.row, at=now)
            self._log(
                session,
                actor,
                "facts.add",
                cube_id=cube.row.id,
                subject=rows[0].id if len(rows) == 1 else None,
                details={
                    "memories": [row.id for row in rows],
                    "stated_again": again,
                    "derived_from": list(turn_ids),
                    "superseded": [older for fact in new for older in fact.supersedes],
                    "version": cube.row.version,
                },
                at=now,
            )
            return load_memories(session, cube, rows)


def _relate(session: Session, seq: int, relation: Relation, targets: Sequence[int]) -> bool:
    """Add what is not there yet; whether that was anything."""
    known = set(
        session.scalars(
            select(LineageRow.target_seq).where(
                LineageRow.memory_seq == seq, LineageRow.relation == relation
            )
        )
    )
    new = [target for target in dict.fromkeys(targets) if target not in known and target != seq]
    insert_lineage(session, [(seq, relation, target) for target in new])
    return bool(new)
