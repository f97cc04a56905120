"""Erase jobs: queued with the erase, then what they look at in the catalog, and what they find."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import datetime

from pydantic import TypeAdapter
from sqlalchemy import Column, Table, func, select
from sqlalchemy.orm import Session

from memos_vllm.control.batches import in_parts
from memos_vllm.control.calls import repeatable
from memos_vllm.control.catalog import Catalog
from memos_vllm.control.idempotency import replies_naming
from memos_vllm.control.jobs import add_job, owned_job
from memos_vllm.control.service import Service
from memos_vllm.control.tables import Base, IdempotencyRow, JobRow, MemoryRow, OutboxRow
from memos_vllm.control.views import proof_to_json
from memos_vllm.domain.access import Principal
from memos_vllm.domain.erasure import ErasureOrder, Proof, Removed
from memos_vllm.domain.job import Job, JobKind, JobState

_ORDERS = TypeAdapter(ErasureOrder)
# Of one job, beyond what a single erase brings: each is 60 bytes of its row.
_MAX_NEEDLES = 20_000


def order_of(job: Job) -> ErasureOrder:
    """What an erase job has to do."""
    return _ORDERS.validate_python(job.payload)


def queue_erasure(
    session: Session,
    order: ErasureOrder,
    *,
    job_id: str,
    cube_id: str,
    actor: Principal,
    at: datetime,
) -> JobRow:
    """Queue an erase job for a cube, or give this to do as well to one that nobody has begun.

    Only to one of the same actor: what a job says is for who asked for it.
    """
    waiting = session.scalar(
        select(JobRow)
        .where(
            JobRow.cube_id == cube_id,
            JobRow.kind == JobKind.ERASE,
            JobRow.state == JobState.QUEUED,
            JobRow.created_by == actor.id,
        )
        .order_by(JobRow.seq.desc())
        .limit(1)
    )
    if waiting is not None:
        former = _ORDERS.validate_python(waiting.payload)
        if len(former.needles) + len(order.needles) <= _MAX_NEEDLES:
            waiting.payload = _ORDERS.dump_python(former.joined(order), mode="json")
            waiting.updated_at = at
            return waiting
    return add_job(
        session,
        job_id=job_id,
        cube_id=cube_id,
        kind=JobKind.ERASE,
        state=JobState.QUEUED,
        message="waiting for a worker",
        payload=_ORDERS.dump_python(order, mode="json"),
        actor=actor,
        at=at,
    )


def newest_entry(session: Session) -> int:
    """The newest entry of the index's outbox, 0 when it is empty."""
    return session.scalar(select(func.max(OutboxRow.seq))) or 0


class ErasingService(Service):
    """The erase jobs' part of `Mos`; its callers are the system's own."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        clock: Callable[[], datetime],
        new_id: Callable[[str], str],
    ) -> None:
        super().__init__(catalog, clock=clock, new_id=new_id)
        self._rewriting = threading.Lock()
        # The outbox entry up to which the files hold nothing of what was erased.
        self._rewritten = -1

    def traces_of(self, job_id: str, order: ErasureOrder) -> dict[str, int]:
        """Rows that still belong to erased memories, by table; empty when there are none.

        Looked for by number in every column that refers to a memory, by id among the memories,
        and by id in every stored reply. What only says that something happened is not a trace:
        the log, the outbox, ids in the history of other memories, this job, and answers that
        name it.
        """
        seqs = [seq for seq, _ in order.memories]
        ids = [name for _, name in order.memories]
        found: dict[str, int] = {}
        with self._catalog.read() as session:
            for table, column in _references():
                for part in in_parts(seqs):
                    rows = select(func.count()).select_from(table).where(column.in_(part))
                    found[table.name] = found.get(table.name, 0) + (session.scalar(rows) or 0)
            for names in in_parts(ids):
                named = select(func.count()).where(MemoryRow.id.in_(names))
                found[MemoryRow.__tablename__] += session.scalar(named) or 0
            ours = f'"{job_id}"'.encode()
            found[IdempotencyRow.__tablename__] = sum(
                row.body is not None and ours not in row.body
                for row in replies_naming(session, ids)
            )
        return {table: rows for table, rows in found.items() if rows}

    @repeatable
    def rewrite_files(self, entry: int) -> bool:
        """Leave nothing in the database's files of what was erased up to this outbox entry.

        Returns:
            False as long as somebody else does it, or a reader holds on to the log.
        Raises:
            Unavailable.
        """
        if self._rewritten >= entry:
            return True
        if not self._rewriting.acquire(blocking=False):
            return False
        try:
            with self._catalog.read() as session:
                newest = max(newest_entry(session), entry)
            tables = {IdempotencyRow.__tablename__, *(table.name for table, _ in _references())}
            if not self._catalog.rewrite(sorted(tables)):
                return False
            self._rewritten = newest
            return True
        finally:
            self._rewriting.release()

    @property
    def rewrites_how(self) -> str:
        """What `rewrite_files` does here, and what it does not, for a person."""
        if self._catalog.engine.dialect.name == "sqlite":
            return (
                "deleted cells were overwritten (secure_delete), the file was written anew "
                "(VACUUM), and the write-ahead log was emptied"
            )
        return (
            "VACUUM of every table that refers to memories; PostgreSQL's own log, free space "
            "within its pages and its backups keep what they hold until they are used again"
        )

    @repeatable
    def note_proof(self, job_id: str, owner: str, proof: Proof) -> bool:
        """Add a proof to a job, in place of an earlier one of the same.

        What logs are searched by is dropped with the proof that they were.

        Returns:
            False when the job is no longer this owner's.
        """
        with self._catalog.write() as session:
            row = owned_job(session, job_id, owner)
            if row is None:
                return False
            kept = [stored for stored in row.proofs or () if stored["what"] != proof.what]
            row.proofs = [*kept, proof_to_json(proof)]
            if proof.what is Removed.LOGS:
                row.payload = {**row.payload, "needles": []}
            return True


def _references() -> Sequence[tuple[Table, Column[int]]]:
    """Every column that holds the number of a memory whose row would belong to it."""
    memories = MemoryRow.__table__
    assert isinstance(memories, Table)
    referring = [
        (table, column)
        for table in Base.metadata.sorted_tables
        for column in table.columns
        if any(key.references(memories) for key in column.foreign_keys)
    ]
    return [(memories, memories.c.seq), *referring]
