"""Turns of conversations, as memories that are linked in the order they were said."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from memos_vllm.control.access import OpenCube, open_cube
from memos_vllm.control.calls import exactly_once
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

    @exactly_once
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
            talk = _Talk.open(session, cube, session_id, marked)
            batch = turns_to_memories(
                turns, session_id=session_id, first_number=talk.turns + 1, now=now
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
            _link(session, rows, after=talk.last)
            if talk.part is not None:
                talk.part.turns += len(rows)
                talk.part.last_memory_seq = rows[-1].seq
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

    @exactly_once
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


@dataclass(frozen=True, slots=True)
class _Talk:
    """A conversation as far as everyone sees it who sees a new turn.

    Args:
        turns: how many there were.
        last: for each set of labels, the last turn that who holds it sees: nobody's chain has a
            gap.
        part: where turns under these labels are counted; None outside of any session.
    """

    turns: int = 0
    last: frozenset[int] = frozenset()
    part: ChatSessionRow | None = None

    @classmethod
    def open(
        cls, session: Session, cube: OpenCube, session_id: str | None, labels: Sequence[str]
    ) -> _Talk:
        if session_id is None:
            return cls()
        parts = session.scalars(
            select(ChatSessionRow).where(
                ChatSessionRow.cube_id == cube.cube_id, ChatSessionRow.session_id == session_id
            )
        ).all()
        seen = [part for part in parts if set(part.labels) <= set(labels)]
        label_set = label_set_of(labels)
        own = next((part for part in seen if part.label_set == label_set), None)
        if own is None:
            own = ChatSessionRow(
                cube_id=cube.cube_id,
                session_id=session_id,
                label_set=label_set,
                labels=sorted(labels),
                turns=0,
                last_memory_seq=None,
            )
            session.add(own)
        return cls(
            turns=sum(part.turns for part in seen),
            last=_last_seen(parts, labels),
            part=own,
        )


def _last_seen(parts: Sequence[ChatSessionRow], labels: Collection[str]) -> frozenset[int]:
    """What was said last for each holder of `labels`; nothing where it was erased."""
    held = [set(labels), *({*labels, *part.labels} for part in parts)]
    last = (
        max((part.last_memory_seq or 0 for part in parts if set(part.labels) <= one), default=0)
        for one in held
    )
    return frozenset(seq for seq in last if seq)


def label_set_of(labels: Sequence[str]) -> str:
    """What tells the turns of a conversation under these labels from its other turns."""
    if not labels:
        return ""
    return hashlib.sha256(json.dumps(sorted(labels)).encode()).hexdigest()


def _link(session: Session, rows: Sequence[MemoryRow], *, after: Collection[int]) -> None:
    """Lead from each turn to the one after it, and from `after` to the first."""
    pairs = [(earlier.seq, later.seq, 0) for earlier, later in itertools.pairwise(rows)]
    for last in sorted(after):
        # What its owner linked it to in the meantime keeps its place.
        known = session.scalar(
            select(func.count()).select_from(EdgeRow).where(EdgeRow.memory_seq == last)
        )
        pairs.append((last, rows[0].seq, known or 0))
    links = [
        {"memory_seq": earlier, "kind": NEXT, "target_seq": later, "weight": 1.0, "rank": rank}
        for earlier, later, rank in pairs
    ]
    if links:
        session.execute(insert(EdgeRow), links)
