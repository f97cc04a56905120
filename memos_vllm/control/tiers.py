"""Promote and demote: which memories are compiled into the prefix, and the job that does it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from memos_vllm.control.access import OpenCube, open_cube, open_memories, visible
from memos_vllm.control.calls import exactly_once
from memos_vllm.control.composition import bakeable, in_prefix, mark_stale, next_position
from memos_vllm.control.indexing import note_changed
from memos_vllm.control.jobs import add_job, queue_job
from memos_vllm.control.service import Service, bump
from memos_vllm.control.tables import JobRow, MemoryRow
from memos_vllm.control.views import to_job
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.checks import JsonObject
from memos_vllm.domain.job import Job, JobKind, JobState
from memos_vllm.domain.lifecycle import Verb, move
from memos_vllm.domain.memory import MAX_BATCH, Tier
from memos_vllm.errors import Conflict, InvalidRequest, TooLarge

_NO_ADAPTERS = (
    "parametric memory arrives with adapters; in this release memories move between plaintext "
    "and activation"
)


class TierService(Service):
    """The tiers' part of `Mos`."""

    @exactly_once
    def promote(
        self,
        actor: Principal,
        cube_id: str,
        *,
        to: Tier,
        memory_ids: Sequence[str] | None = None,
    ) -> Job:
        """Put memories into the activation tier and queue the bake of the cube.

        Memories keep their place in the prefix; new ones go to its end, in the order named, so
        that what was baked before stays a valid beginning.

        Args:
            memory_ids: None for every memory that is active, unexpired and without labels.
        Returns:
            The bake; one that waits already is used again.
        Raises:
            NotFound: the cube or a memory.
            InvalidRequest: another tier, no ids, or a labelled memory.
            Conflict: a memory is not active or has expired, or there is nothing to promote.
            TooLarge: more than 1,000 ids.
        """
        _check_tier(to, "to", otherwise="use demote to bring memories back to plaintext")
        named = _check_ids(memory_ids)
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.WRITE)
            if named is None:
                rows = _all_bakeable(session, cube, now=now)
            else:
                rows = open_memories(session, cube, named)
                for row in rows:
                    _check_promotable(row, now=now)
            if not rows:
                raise Conflict(
                    f"memcube '{cube.row.id}' has no active, unlabelled memory to promote; "
                    "add some first"
                )
            moved = [row for row in rows if row.tier is not Tier.ACTIVATION]
            first = next_position(session, cube.row.id)
            _set_tier(session, moved, Tier.ACTIVATION, first_position=first)
            if moved:
                bump(cube.row, at=now)
                note_changed(session, cube.row.id, [row.seq for row in moved])
            return self._bake(session, actor, cube, "promote", moved, at=now)

    @exactly_once
    def demote(
        self,
        actor: Principal,
        cube_id: str,
        *,
        from_tier: Tier,
        memory_ids: Sequence[str] | None = None,
    ) -> Job:
        """Bring memories back to plaintext; artifacts that name them become stale.

        Args:
            memory_ids: None for every memory of the tier, archived ones included.
        Returns:
            A bake of what remains, or a job that has succeeded when nothing does.
        Raises:
            NotFound: the cube or a memory.
            InvalidRequest: another tier, or no ids.
            Conflict: a memory is not in the tier.
            TooLarge: more than 1,000 ids.
        """
        _check_tier(from_tier, "from", otherwise="a memory cannot go below plaintext")
        named = _check_ids(memory_ids)
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.WRITE)
            if named is None:
                rows = _all_of_tier(session, cube, from_tier)
            else:
                rows = open_memories(session, cube, named)
                for row in rows:
                    if row.tier is not from_tier:
                        raise Conflict(
                            f"memory '{row.id}' is in the {row.tier.value} tier, "
                            f"not in {from_tier.value}"
                        )
            _set_tier(session, rows, Tier.PLAINTEXT, first_position=None)
            if rows:
                bump(cube.row, at=now)
                mark_stale(session, cube.row.id, memory_seqs=[row.seq for row in rows])
                note_changed(session, cube.row.id, [row.seq for row in rows])
            return self._bake(session, actor, cube, "demote", rows, at=now)

    def _bake(
        self,
        session: Session,
        actor: Principal,
        cube: OpenCube,
        verb: str,
        moved: Sequence[MemoryRow],
        *,
        at: datetime,
    ) -> Job:
        """Queue the bake if there is anything to bake, and log the move with its job."""
        session.flush()
        remaining = session.scalar(
            select(func.count())
            .select_from(MemoryRow)
            .where(MemoryRow.cube_id == cube.row.id, in_prefix(at))
        )
        payload: JsonObject = {"verb": verb, "memories": remaining}
        job: JobRow
        if remaining:
            job = queue_job(
                session,
                job_id=self._new_id("job"),
                cube_id=cube.row.id,
                kind=JobKind.BAKE,
                payload=payload,
                actor=actor,
                at=at,
            )
        else:
            job = add_job(
                session,
                job_id=self._new_id("job"),
                cube_id=cube.row.id,
                kind=JobKind.BAKE,
                state=JobState.SUCCEEDED,
                message="no activation memory is left to bake",
                payload=payload,
                actor=actor,
                at=at,
            )
        details: dict[str, int | str | list[str]] = {
            "job": job.id,
            "moved": len(moved),
            "version": cube.row.version,
        }
        if len(moved) <= MAX_BATCH:
            details["memories"] = [row.id for row in moved]
        self._log(session, actor, f"memory.{verb}", cube_id=cube.row.id, details=details, at=at)
        return to_job(job)


def _check_tier(tier: Tier, param: str, *, otherwise: str) -> None:
    if tier is Tier.PARAMETRIC:
        raise InvalidRequest(_NO_ADAPTERS, param=param)
    if tier is Tier.PLAINTEXT:
        raise InvalidRequest(f"{param} cannot be plaintext: {otherwise}", param=param)


def _check_ids(memory_ids: Sequence[str] | None) -> list[str] | None:
    if memory_ids is None:
        return None
    if isinstance(memory_ids, str) or not memory_ids:
        raise InvalidRequest('memory_ids must be "all" or name a memory', param="memory_ids")
    if len(memory_ids) > MAX_BATCH:
        raise TooLarge(
            f"memory_ids names {len(memory_ids)} memories and the limit is {MAX_BATCH}; "
            'send several calls, or "all"'
        )
    return list(dict.fromkeys(memory_ids))


def _all_bakeable(session: Session, cube: OpenCube, *, now: datetime) -> Sequence[MemoryRow]:
    query = select(MemoryRow).where(visible(cube), bakeable(now)).order_by(MemoryRow.seq)
    return session.scalars(query).all()


def _all_of_tier(session: Session, cube: OpenCube, tier: Tier) -> Sequence[MemoryRow]:
    query = select(MemoryRow).where(visible(cube), MemoryRow.tier == tier).order_by(MemoryRow.seq)
    return session.scalars(query).all()


def _check_promotable(row: MemoryRow, *, now: datetime) -> None:
    move(row.state, Verb.PROMOTE, memory_id=row.id, expires_at=row.expires_at, now=now)
    if row.labels:
        raise InvalidRequest(
            f"memory '{row.id}' has labels, and a labelled memory stays plaintext; "
            "remove its labels or leave it out",
            param="memory_ids",
        )


def _set_tier(
    session: Session, rows: Sequence[MemoryRow], tier: Tier, *, first_position: int | None
) -> None:
    """Move rows to `tier`, numbered from `first_position`, or without a place when None."""
    for offset, row in enumerate(rows):
        row.tier = tier
        row.position = 0 if first_position is None else first_position + offset
    session.flush()
