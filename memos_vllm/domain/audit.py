"""The audit log as its readers see it: no memory text, and a chain of hashes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from memos_vllm.domain.checks import JsonObject

GENESIS_HASH = "0" * 64


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change. `seq` counts from 1 without a gap; `hash` seals the row and `previous_hash`."""

    seq: int
    at: datetime
    actor: str
    action: str
    cube_id: str | None
    subject: str | None
    details: JsonObject = field(default_factory=dict)
    previous_hash: str = GENESIS_HASH
    hash: str = GENESIS_HASH


class AuditProblem(StrEnum):
    """What is wrong with the first bad row."""

    ALTERED = "altered"
    MISSING = "missing"
    OUT_OF_PLACE = "out-of-place"


@dataclass(frozen=True, slots=True)
class AuditVerdict:
    """Whether the log is whole; otherwise the first row that is not, and why.

    Args:
        entries: rows that were read and found good.
        head_hash: hash of the last good row, worth noting down elsewhere.
    """

    ok: bool
    entries: int
    head_hash: str
    bad_seq: int | None = None
    problem: AuditProblem | None = None
    message: str = "the audit log is whole"


def seal(
    *,
    at: str,
    actor: str,
    action: str,
    cube_id: str | None,
    subject: str | None,
    details: str,
    previous_hash: str,
) -> str:
    """Hex SHA-256 of a row's content and its predecessor's hash.

    The number of the row stays out, so that a row which is whole but in the wrong place can be
    told from one that was altered; the predecessor's hash fixes the order.
    """
    content = json.dumps(
        [at, actor, action, cube_id, subject, details, previous_hash],
        ensure_ascii=False,
        separators=(",", ":"),
    )
    return hashlib.sha256(content.encode("utf-8")).hexdigest()
