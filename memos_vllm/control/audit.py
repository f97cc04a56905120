"""The audit log: appended in the transaction of the change that it tells of."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from sqlalchemy.orm import Session

from memos_vllm.control.tables import AuditHeadRow, AuditRow
from memos_vllm.domain.audit import GENESIS_HASH, AuditEntry, SealedRow, canonical, seal
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
        details=canonical(details or {}),
        previous_hash=head.hash,
    )
    row.hash = seal(
        at=row.at,
        actor=row.actor,
        action=row.action,
        cube_id=row.cube_id,
        subject=row.subject,
        details=row.details,
        previous_hash=row.previous_hash,
    )
    head.seq, head.hash = row.seq, row.hash
    session.add(row)


def to_entry(row: AuditRow) -> AuditEntry:
    """A row as its readers see it."""
    return AuditEntry(
        seq=row.seq,
        at=datetime.fromisoformat(row.at),
        actor=row.actor,
        action=row.action,
        cube_id=row.cube_id,
        subject=row.subject,
        details=_details(row.details),
        previous_hash=row.previous_hash,
        hash=row.hash,
    )


def _details(stored: str) -> JsonObject:
    """What a row says; of a row that somebody tampered with, what is there."""
    try:
        details = json.loads(stored)
    except ValueError:
        details = None
    return details if isinstance(details, dict) else {"unreadable": stored}


def to_sealed(row: AuditRow) -> SealedRow:
    """A row as it was hashed."""
    return SealedRow(
        seq=row.seq,
        at=row.at,
        actor=row.actor,
        action=row.action,
        cube_id=row.cube_id,
        subject=row.subject,
        details=row.details,
        previous_hash=row.previous_hash,
        hash=row.hash,
    )
