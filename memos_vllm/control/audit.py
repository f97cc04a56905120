"""The audit log: appended in the transaction of the change that it tells of."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from memos_vllm.control.tables import AuditHeadRow, AuditRow
from memos_vllm.domain.audit import (
    GENESIS_HASH,
    AuditEntry,
    AuditProblem,
    AuditVerdict,
    seal,
)
from memos_vllm.domain.checks import JsonObject

_HEAD = 1


def append(
    session: Session,
    *,
    at: datetime,
    actor: str,
    action: str,
    cube_id: str | None = None,
    subject: str | None = None,
    details: JsonObject | None = None,
) -> None:
    """Add one entry to the end of the chain, in the session's transaction.

    Args:
        action: what was done, `noun.verb`.
        subject: id of the memory, job or artifact it was done to.
        details: ids, counts and names of fields; never a memory's text, which could not be
            erased from here.
    """
    head = session.get(AuditHeadRow, _HEAD)
    if head is None:
        head = AuditHeadRow(id=_HEAD, seq=0, hash=GENESIS_HASH)
        session.add(head)
    row = AuditRow(
        seq=head.seq + 1,
        at=at.astimezone(UTC).isoformat(timespec="microseconds"),
        actor=actor,
        action=action,
        cube_id=cube_id,
        subject=subject,
        details=json.dumps(
            details or {}, ensure_ascii=False, sort_keys=True, separators=(",", ":")
        ),
        previous_hash=head.hash,
    )
    row.hash = _seal(row)
    head.seq, head.hash = row.seq, row.hash
    session.add(row)


def _seal(row: AuditRow) -> str:
    return seal(
        at=row.at,
        actor=row.actor,
        action=row.action,
        cube_id=row.cube_id,
        subject=row.subject,
        details=row.details,
        previous_hash=row.previous_hash,
    )


def to_entry(row: AuditRow) -> AuditEntry:
    """A row as its readers see it."""
    return AuditEntry(
        seq=row.seq,
        at=datetime.fromisoformat(row.at),
        actor=row.actor,
        action=row.action,
        cube_id=row.cube_id,
        subject=row.subject,
        details=json.loads(row.details),
        previous_hash=row.previous_hash,
        hash=row.hash,
    )


def verify(session: Session) -> AuditVerdict:
    """Read the whole log in order and name the first row that breaks the chain.

    Finds a row that was altered, removed, inserted or moved, at either end too. Whoever can
    rewrite the whole file can forge a whole new chain: compare `head_hash` with one noted down
    elsewhere.
    """
    good, previous_hash = 0, GENESIS_HASH
    rows = select(AuditRow).order_by(AuditRow.seq).execution_options(yield_per=1000)
    for row in session.scalars(rows):
        broken = _problem(row, expected_seq=good + 1, previous_hash=previous_hash)
        if broken is not None:
            return _verdict(good, previous_hash, *broken)
        good, previous_hash = row.seq, row.hash
    head = session.get(AuditHeadRow, _HEAD)
    head_seq, head_hash = (head.seq, head.hash) if head else (0, GENESIS_HASH)
    if head_seq > good:
        return _verdict(good, previous_hash, good + 1, AuditProblem.MISSING)
    if head_seq < good:
        return _verdict(good, previous_hash, head_seq + 1, AuditProblem.OUT_OF_PLACE)
    if head_hash != previous_hash:
        return _verdict(good, previous_hash, good, AuditProblem.ALTERED)
    return AuditVerdict(ok=True, entries=good, head_hash=previous_hash)


def _problem(
    row: AuditRow, *, expected_seq: int, previous_hash: str
) -> tuple[int, AuditProblem] | None:
    if row.seq > expected_seq:
        return expected_seq, AuditProblem.MISSING
    if _seal(row) != row.hash:
        return row.seq, AuditProblem.ALTERED
    if row.seq != expected_seq or row.previous_hash != previous_hash:
        return row.seq, AuditProblem.OUT_OF_PLACE
    return None


_MESSAGES = {
    AuditProblem.ALTERED: "was altered: its content does not give its hash",
    AuditProblem.MISSING: "is missing",
    AuditProblem.OUT_OF_PLACE: "is out of place: it does not follow the row before it",
}


def _verdict(good: int, head_hash: str, bad_seq: int, problem: AuditProblem) -> AuditVerdict:
    return AuditVerdict(
        ok=False,
        entries=good,
        head_hash=head_hash,
        bad_seq=bad_seq,
        problem=problem,
        message=f"audit row {bad_seq} {_MESSAGES[problem]}",
    )
