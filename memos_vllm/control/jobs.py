"""Jobs: queued with a change, claimed under a lease, finished once."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Select, or_, select, true, union_all
from sqlalchemy.orm import Session

from memos_vllm.control.access import cubes_for, listing_of, open_cube, require_id
from memos_vllm.control.calls import exactly_once, repeatable
from memos_vllm.control.paging import check_limit, cut, number_key, sealed_number
from memos_vllm.control.service import Service
from memos_vllm.control.tables import CubeRow, JobRow
from memos_vllm.control.views import to_job
from memos_vllm.domain.access import SYSTEM, Access, Principal
from memos_vllm.domain.checks import JsonObject
from memos_vllm.domain.job import Job, JobKind, JobState
from memos_vllm.domain.page import Page
from memos_vllm.errors import Conflict, NotFound

MAX_ATTEMPTS = 5
# Whatever is down will be up again, and then what was to be removed must still go.
NEVER_GIVEN_UP = frozenset({JobKind.ERASE})
_LISTING = "jobs"


class JobService(Service):
    """The jobs' part of `Mos`."""

    def get_job(self, actor: Principal, job_id: str) -> Job:
        """The job, when the actor may read its cube; raises NotFound."""
        with self._catalog.read() as session:
            return to_job(_open_job(session, actor, job_id, Access.READ))

    def list_jobs(
        self,
        actor: Principal,
        *,
        cube_id: str | None = None,
        state: JobState | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page[Job]:
        """Jobs of the cubes that the actor may read, newest first.

        Raises:
            NotFound: the cube.
            InvalidRequest: limit or cursor.
        """
        check_limit(limit)
        listing = _LISTING if cube_id is None else listing_of(_LISTING, cube_id)
        secret = self._catalog.secret
        before = number_key(listing, cursor, secret=secret)
        wanted = (
            select(JobRow)
            .join(CubeRow, CubeRow.id == JobRow.cube_id)
            .where(cubes_for(actor, Access.READ), _seen_by(actor))
            .order_by(JobRow.seq.desc())
            .limit(limit + 1)
        )
        if state is not None:
            wanted = wanted.where(JobRow.state == state)
        if before is not None:
            wanted = wanted.where(JobRow.seq < before)
        with self._catalog.read() as session:
            if cube_id is not None:
                cube = open_cube(session, actor, cube_id, Access.READ)
                wanted = wanted.where(JobRow.cube_id == cube.row.id)
            rows, next_cursor = cut(
                session.scalars(wanted).all(),
                limit=limit,
                listing=listing,
                key=lambda row: sealed_number(listing, row.seq, secret=secret),
            )
            return Page([to_job(row) for row in rows], next_cursor)

    @exactly_once
    def cancel_job(self, actor: Principal, job_id: str) -> Job:
        """Cancel a job; a worker that runs it learns so from `renew_job`.

        Raises:
            NotFound.
            Conflict: it has succeeded or failed, or is an erasure. Cancelling twice is no error.
        """
        now = self._clock()
        with self._catalog.write() as session:
            row = _open_job(session, actor, job_id, Access.WRITE)
            if row.state is JobState.CANCELLED:
                return to_job(row)
            if row.state.finished:
                raise Conflict(f"job '{row.id}' has {row.state.value} already")
            if row.kind is JobKind.ERASE:
                raise Conflict("an erasure cannot be cancelled: the text is gone already")
            _close(row, JobState.CANCELLED, message="cancelled", error=None, at=now)
            self._log(session, actor, "job.cancel", cube_id=row.cube_id, subject=row.id, at=now)
            return to_job(row)

    @repeatable
    def claim_job(
        self, owner: str, *, lease_seconds: float, kinds: Collection[JobKind] | None = None
    ) -> Job | None:
        """Take the oldest job that is queued or whose lease ran out; None when there is none.

        Of several processes that ask at once only one gets a job. A job that was claimed
        `MAX_ATTEMPTS` times without an end fails instead; an erasure does not.

        Args:
            owner: names this worker among all workers.
            kinds: those that it does; None for all.
        """
        wanted = true() if kinds is None else JobRow.kind.in_(kinds)
        with self._catalog.read() as session:
            # Most calls find nothing, and then need no write lock.
            if session.scalar(_oldest_claimable(self._clock(), wanted)) is None:
                return None
        with self._catalog.write() as session:
            now = self._clock()
            # One at a time: there may be as many as there are cubes.
            oldest = _oldest_claimable(now, wanted).scalar_subquery()
            waiting = select(JobRow).where(JobRow.seq == oldest)
            while (row := session.scalar(waiting)) is not None:
                if row.attempts >= MAX_ATTEMPTS and row.kind not in NEVER_GIVEN_UP:
                    self._give_up(session, row, at=now)
                    continue
                row.state = JobState.RUNNING
                row.lease_owner = owner
                row.lease_until = now + timedelta(seconds=lease_seconds)
                row.attempts += 1
                row.updated_at = now
                return to_job(row)
        return None

    @repeatable
    def renew_job(
        self,
        job_id: str,
        owner: str,
        *,
        lease_seconds: float,
        progress: float,
        message: str,
    ) -> bool:
        """Report progress and keep the lease.

        Returns:
            False when the job is no longer this owner's: cancelled, deleted with its cube, or
            claimed by another after the lease ran out. The worker then stops.
        """
        now = self._clock()
        with self._catalog.write() as session:
            row = owned_job(session, job_id, owner)
            if row is None:
                return False
            row.lease_until = now + timedelta(seconds=lease_seconds)
            row.progress = min(max(progress, 0.0), 1.0)
            row.message = message
            row.updated_at = now
            return True

    @exactly_once
    def finish_job(
        self,
        job_id: str,
        owner: str,
        *,
        state: JobState,
        message: str,
        error: str | None = None,
    ) -> bool:
        """End a job; nothing happens when it is no longer this owner's.

        Args:
            state: succeeded, failed or cancelled.
            message, error: for a person, without any memory's text.
        Returns:
            Whether the job was this owner's.
        """
        assert state.finished, "a job ends as succeeded, failed or cancelled"
        now = self._clock()
        with self._catalog.write() as session:
            row = owned_job(session, job_id, owner)
            if row is None:
                return False
            _close(row, state, message=message, error=error, at=now)
            self._log_end(session, row, at=now)
            return True

    def _give_up(self, session: Session, row: JobRow, *, at: datetime) -> None:
        error = f"no worker brought it to an end in {row.attempts} attempts"
        _close(row, JobState.FAILED, message="gave up", error=error, at=at)
        self._log_end(session, row, at=at)

    def _log_end(self, session: Session, row: JobRow, *, at: datetime) -> None:
        self._log(
            session,
            SYSTEM,
            "job.finish",
            cube_id=row.cube_id,
            subject=row.id,
            details={"state": row.state.value, "attempts": row.attempts},
            at=at,
        )


def queue_job(
    session: Session,
    *,
    job_id: str,
    cube_id: str,
    kind: JobKind,
    payload: JsonObject,
    actor: Principal,
    at: datetime,
) -> JobRow:
    """A queued job of this kind for the cube: the one that waits already, or a new one."""
    waiting = session.scalar(
        select(JobRow)
        .where(JobRow.cube_id == cube_id, JobRow.kind == kind, JobRow.state == JobState.QUEUED)
        .order_by(JobRow.seq)
        .limit(1)
    )
    if waiting is not None:
        return waiting
    return add_job(
        session,
        job_id=job_id,
        cube_id=cube_id,
        kind=kind,
        state=JobState.QUEUED,
        message="waiting for a worker",
        payload=payload,
        actor=actor,
        at=at,
    )


def add_job(
    session: Session,
    *,
    job_id: str,
    cube_id: str,
    kind: JobKind,
    state: JobState,
    message: str,
    payload: JsonObject,
    actor: Principal,
    at: datetime,
) -> JobRow:
    """A new job in `state`; one that starts out finished records work that was not needed."""
    row = JobRow(
        id=job_id,
        cube_id=cube_id,
        kind=kind,
        state=state,
        progress=1.0 if state is JobState.SUCCEEDED else 0.0,
        message=message,
        error=None,
        payload=dict(payload),
        created_by=actor.id,
        created_at=at,
        updated_at=at,
        lease_owner=None,
        lease_until=None,
        attempts=0,
        proofs=None,
    )
    session.add(row)
    session.flush()
    return row


def _open_job(session: Session, actor: Principal, job_id: str, access: Access) -> JobRow:
    require_id("job", job_id)
    row = session.scalar(
        select(JobRow)
        .join(CubeRow, CubeRow.id == JobRow.cube_id)
        .where(JobRow.id == job_id, cubes_for(actor, access), _seen_by(actor))
    )
    if row is None:
        raise NotFound("job", job_id)
    return row


def _seen_by(actor: Principal) -> ColumnElement[bool]:
    """Condition on `JobRow` and its cube: what it says of its work is for the actor, too.

    A job that reads what was said, or erases it, may work on what is under a label: it is for who
    asked for it, and for owners.
    """
    return or_(
        JobRow.kind.not_in((JobKind.EXTRACT, JobKind.ERASE)),
        JobRow.created_by == actor.id,
        cubes_for(actor, Access.MANAGE),
    )


def _oldest_claimable(now: datetime, wanted: ColumnElement[bool]) -> Select[int]:
    """The first of the wanted that is queued, or whose lease ran out: each by an index, in its
    order."""
    queued = select(JobRow.seq).where(JobRow.state == JobState.QUEUED, wanted)
    lapsed = select(JobRow.seq).where(
        JobRow.state == JobState.RUNNING, JobRow.lease_until <= now, wanted
    )
    first = (one.order_by(JobRow.seq).limit(1).subquery() for one in (queued, lapsed))
    oldest = union_all(*(select(one.c.seq) for one in first)).subquery()
    return select(oldest.c.seq).order_by(oldest.c.seq).limit(1)


def owned_job(session: Session, job_id: str, owner: str) -> JobRow | None:
    """The job, as long as this worker has it."""
    return session.scalar(
        select(JobRow).where(
            JobRow.id == job_id,
            JobRow.lease_owner == owner,
            JobRow.state == JobState.RUNNING,
        )
    )


def _close(row: JobRow, state: JobState, *, message: str, error: str | None, at: datetime) -> None:
    row.state = state
    row.message = message
    row.error = error
    row.lease_owner = row.lease_until = None
    row.updated_at = at
    if state is JobState.SUCCEEDED:
        row.progress = 1.0
