"""The audit log as its readers see it: no memory text, and a chain of hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

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


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which entries are wanted: all that fit every field that is given."""

    actor: str | None = None
    action: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class SealedRow:
    """A row of the log exactly as it was hashed; the text of `details` is JSON."""

    seq: int
    at: str
    actor: str
    action: str
    cube_id: str | None
    subject: str | None
    details: str
    previous_hash: str
    hash: str

    def to_line(self) -> bytes:
        """The row as a line of JSON; `details` is an object unless somebody tampered with it."""
        line: dict[str, Any] = asdict(self)
        try:
            details = json.loads(self.details)
        except ValueError:
            details = self.details
        if canonical(details) == self.details:
            line["details"] = details
        return _line(line)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> SealedRow:
        """A row of `to_line`, decoded; raises LookupError, TypeError."""
        details = line["details"]
        row = cls(
            seq=line["seq"],
            at=line["at"],
            actor=line["actor"],
            action=line["action"],
            cube_id=line["cube_id"],
            subject=line["subject"],
            details=details if isinstance(details, str) else canonical(details),
            previous_hash=line["previous_hash"],
            hash=line["hash"],
        )
        if type(row.seq) is not int:
            raise TypeError("seq")
        return row


@dataclass(frozen=True, slots=True)
class AuditHead:
    """Where the log ends."""

    seq: int = 0
    hash: str = GENESIS_HASH

    def to_line(self) -> bytes:
        """The last line of an exported log, by which a file that was cut short is known."""
        return _line({"object": HEAD_OBJECT, **asdict(self)})


HEAD_OBJECT = "audit.head"


class ChainCheck:
    """Reads a log row by row, from the first, and names the first row that breaks the chain."""

    def __init__(self) -> None:
        self._reached = AuditHead()

    def add(self, row: SealedRow) -> AuditVerdict | None:
        """The verdict when this row breaks the chain, None when it follows."""
        expected = self._reached.seq + 1
        if row.seq > expected:
            return self._broken(expected, AuditProblem.MISSING)
        if _seal(row) != row.hash:
            return self._broken(row.seq, AuditProblem.ALTERED)
        if row.seq != expected or row.previous_hash != self._reached.hash:
            return self._broken(row.seq, AuditProblem.OUT_OF_PLACE)
        self._reached = AuditHead(row.seq, row.hash)
        return None

    def end(self, head: AuditHead) -> AuditVerdict:
        """The verdict over all rows, given where the log says that it ends."""
        reached = self._reached
        if head.seq > reached.seq:
            return self._broken(reached.seq + 1, AuditProblem.MISSING)
        if head.seq < reached.seq:
            return self._broken(head.seq + 1, AuditProblem.OUT_OF_PLACE)
        if head.hash != reached.hash:
            return self._broken(reached.seq, AuditProblem.ALTERED)
        return AuditVerdict(ok=True, entries=reached.seq, head_hash=reached.hash)

    def _broken(self, bad_seq: int, problem: AuditProblem) -> AuditVerdict:
        return AuditVerdict(
            ok=False,
            entries=self._reached.seq,
            head_hash=self._reached.hash,
            bad_seq=bad_seq,
            problem=problem,
            message=f"audit row {bad_seq} {_MESSAGES[problem]}",
        )


_MESSAGES = {
    AuditProblem.ALTERED: "was altered: its content does not give its hash",
    AuditProblem.MISSING: "is missing",
    AuditProblem.OUT_OF_PLACE: "is out of place: it does not follow the row before it",
}


def canonical(details: object) -> str:
    """Details as the text that is stored and hashed."""
    return json.dumps(details, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _line(value: object) -> bytes:
    return f"{json.dumps(value, ensure_ascii=False)}\n".encode()


def _seal(row: SealedRow) -> str:
    return seal(
        at=row.at,
        actor=row.actor,
        action=row.action,
        cube_id=row.cube_id,
        subject=row.subject,
        details=row.details,
        previous_hash=row.previous_hash,
    )


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
