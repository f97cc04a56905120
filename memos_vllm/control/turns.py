"""Turns of conversations, as memories that are linked in the order they were said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from memos_vllm.control.access import OpenCube, open_cube
from memos_vllm.control.jobs import add_job
from memos_vllm.control.memory_writes import insert_memories
from memos_vllm.control.service import Service, bump
from memos_vllm.control.tables import ChatSessionRow, EdgeRow, MemoryRow
from memos_vllm.control.views import load_memories, to_job
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.checks import check_words
from memos_vllm.domain.job import Job, JobKind, JobState
from memos_vllm.domain.memory import Memory, validate_reason
from memos_vllm.domain.turn import NEXT, NewTurn, check_session_id, turns_to_memories


class TurnService(Service):
    """The conversations' part of `Mos`."""

    def add_turns(
        self,
        actor: Principal,
        cube_id: str,
        turns: Sequence[NewTurn],
        *,
        session_id: str | None = None,
        labels: Sequence[str] = (),
        reason: str | None = None,
    ) -> list[Memory]:
        """Keep turns as memories, each linked to the one said after it; all or none.

        Args:
            turns: 1 to 1,000, in the order they were said.
            session_id: turns of an earlier call with the same id come before these.
            labels: of each of them.
        Raises:
            NotFound: the cube.
            InvalidRequest, TooLarge: the message names the turn and the field.
        """
        check_session_id(session_id)
        validate_reason(reason)
        marked = check_words(labels, param="labels")
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.WRITE)
            talk = None if session_id is None else _open_session(session, cube, session_id)
            batch = turns_to_memories(
                turns,
                session_id=session_id,
                first_number=1 if talk is None else talk.turns + 1,
                now=now,
            )
            rows = insert_memories(
                session,
                cube,
                [replace(memory, labels=marked) for memory in batch],
                ids=[self._new_id("mem") for _ in batch],
                actor=actor,
                reason=reason,
                at=now,
            )
            _link(session, rows, after=None if talk is None else talk.last_memory_seq)
            if talk is not None:
                talk.turns += len(rows)
                talk.last_memory_seq = rows[-1].seq
            bump(cube.row, at=now)
            self._log(
                session,
                actor,
                "turns.add",
                cube_id=cube.row.id,
                subject=rows[0].id if len(rows) == 1 else None,
                details={"memories": [row.id for row in rows], "version": cube.row.version},
                at=now,
            )
            return load_memories(session, cube, rows)

    def remember_turn(
        self,
        actor: Principal,
        cube_id: str,
        turns: Sequence[NewTurn],
        *,
        session_id: str | None,
        read: bool,
        labels: Sequence[str] = (),
    ) -> tuple[list[Memory], Job | None]:
        """Keep what was just said; with `read`, also queue the reading of facts out of it.

        Args:
            labels: of what the answer was given from; they go on to the facts.
        Raises:
            NotFound, InvalidRequest, TooLarge: as `add_turns`; nothing was stored.
        """
        with self._catalog.together() as session:
            stored = self.add_turns(actor, cube_id, turns, session_id=session_id, labels=labels)
            if not read:
                return stored, None
            job = add_job(
                session,
                job_id=self._new_id("job"),
                cube_id=cube_id,
                kind=JobKind.EXTRACT,
                state=JobState.QUEUED,
                message="waiting for a worker",
                payload={"memory_ids": [memory.id for memory in stored]},
                actor=actor,
                at=self._clock(),
            )
            return stored, to_job(job)


def _open_session(session: Session, cube: OpenCube, session_id: str) -> ChatSessionRow:
    talk = session.get(ChatSessionRow, (cube.row.id, session_id))
    if talk is None:
        talk = ChatSessionRow(
            cube_id=cube.row.id, session_id=session_id, turns=0, last_memory_seq=None
        )
        session.add(talk)
    return talk


def _link(session: Session, rows: Sequence[MemoryRow], *, after: int | None) -> None:
    chain = [row.seq for row in rows]
    ranks = [0] * len(chain)
    if after is not None:
        chain.insert(0, after)
        # What its owner linked it to in the meantime keeps its place.
        known = session.scalar(
            select(func.count()).select_from(EdgeRow).where(EdgeRow.memory_seq == after)
        )
        ranks.insert(0, known or 0)
    links = [
        {"memory_seq": earlier, "kind": NEXT, "target_seq": later, "weight": 1.0, "rank": rank}
        for earlier, later, rank in zip(chain, chain[1:], ranks, strict=False)
    ]
    if links:
        session.execute(insert(EdgeRow), links)
