"""Reading the audit log."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from memos_vllm.control.access import listing_of, open_cube, require_id
from memos_vllm.control.audit import to_entry, to_sealed
from memos_vllm.control.paging import check_limit, cut, number_key, sealed_number
from memos_vllm.control.service import Service
from memos_vllm.control.sql import unindexed
from memos_vllm.control.tables import AuditHeadRow, AuditRow
from memos_vllm.domain.access import SYSTEM, Access, Principal
from memos_vllm.domain.audit import (
    AuditEntry,
    AuditFilter,
    AuditHead,
    AuditVerdict,
    ChainCheck,
    SealedRow,
)
from memos_vllm.domain.checks import check_time
from memos_vllm.domain.page import Page
from memos_vllm.errors import NotFound

_LISTING = "audit"
_ALL = AuditFilter()
# Rows of one read: about 1 MiB, and some milliseconds in which nothing else waits.
_ROWS_AT_ONCE = 1000
# A forged row may have any number.
_BEFORE_ALL = -(2**63)


class LogService(Service):
    """The audit log's part of `Mos`.

    A cube's entries are for its owners and auditors, also those about what is labelled: they
    name ids and labels, and no text. The whole log is for administrators.
    """

    def audit_entries(
        self,
        actor: Principal,
        cube_id: str | None = None,
        *,
        which: AuditFilter = _ALL,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page[AuditEntry]:
        """Entries, newest first; an administrator also reads those of cubes that are gone.

        Args:
            cube_id: None for the whole log.
        Raises:
            NotFound: no such cube, or not for this actor.
            InvalidRequest: limit, cursor, or a time without a zone or outside the calendar.
        """
        check_limit(limit)
        listing = _LISTING if cube_id is None else listing_of(_LISTING, cube_id)
        secret = self._catalog.secret
        before = number_key(listing, cursor, secret=secret)
        wanted = _of_cube(cube_id).order_by(AuditRow.seq.desc()).limit(limit + 1)
        if before is not None:
            wanted = wanted.where(AuditRow.seq < before)
        # One index finds them in order: a cube's, else an actor's, else an action's.
        apart = cube_id is not None
        if which.actor is not None:
            wanted = wanted.where(_column(AuditRow.actor, looked_up=not apart) == which.actor)
            apart = True
        if which.action is not None:
            wanted = wanted.where(_column(AuditRow.action, looked_up=not apart) == which.action)
        if (since := check_time(which.since, param="since")) is not None:
            wanted = wanted.where(AuditRow.at >= _stored(since))
        if (until := check_time(which.until, param="until")) is not None:
            wanted = wanted.where(AuditRow.at < _stored(until))
        with self._catalog.read() as session:
            _check_auditor(session, actor, cube_id)
            rows = session.scalars(wanted).all()
            shown, next_cursor = cut(
                rows,
                limit=limit,
                listing=listing,
                key=lambda row: sealed_number(listing, row.seq, secret=secret),
            )
            return Page([to_entry(row) for row in shown], next_cursor)

    def export_audit(self, actor: Principal, cube_id: str | None = None) -> Iterator[bytes]:
        """Entries as lines of JSON, oldest first, as they are when it begins; in parts.

        The whole log ends with a line that says where it ends, and can be verified by itself.

        Raises:
            NotFound: no such cube, or not for this actor; before the first part.
        """
        with self._catalog.read() as session:
            _check_auditor(session, actor, cube_id)
            head = _head(session)
        yield from (b"".join(row.to_line() for row in rows) for rows in self._rows(head, cube_id))
        yield b"" if cube_id is not None else head.to_line()

    def verify_audit(self, actor: Principal = SYSTEM) -> AuditVerdict:
        """Read the whole log in order and name the first row that breaks the chain.

        Finds a row that was altered, removed, inserted or moved, at either end too. Whoever can
        rewrite the whole file can forge a whole new chain: compare `head_hash` with one noted
        down elsewhere.

        Raises:
            NotFound: the actor is no administrator: how much the log holds tells of every cube.
        """
        check = ChainCheck()
        with self._catalog.read() as session:
            _check_auditor(session, actor, None)
            head = _head(session)
            beyond = session.scalar(select(AuditRow.seq).where(AuditRow.seq > head.seq).limit(1))
        for rows in self._rows(head if beyond is None else AuditHead(beyond), None):
            for row in rows:
                if (broken := check.add(row)) is not None:
                    return broken
        return check.end(head)

    def _rows(self, head: AuditHead, cube_id: str | None) -> Iterator[list[SealedRow]]:
        """Rows up to `head` in order, each part by a read of its own: no reader stays long."""
        reached = _BEFORE_ALL
        while True:
            part = (
                _of_cube(cube_id)
                .where(AuditRow.seq > reached, AuditRow.seq <= head.seq)
                .order_by(AuditRow.seq)
                .limit(_ROWS_AT_ONCE)
            )
            with self._catalog.read() as session:
                rows = [to_sealed(row) for row in session.scalars(part)]
            if not rows:
                return
            reached = rows[-1].seq
            yield rows


def _of_cube(cube_id: str | None) -> Select[AuditRow]:
    wanted = select(AuditRow)
    if cube_id is None:
        return wanted
    return wanted.where(AuditRow.cube_id == require_id("memcube", cube_id))


def _column(
    column: InstrumentedAttribute[str], *, looked_up: bool
) -> ColumnElement[str] | InstrumentedAttribute[str]:
    return column if looked_up else unindexed(column)


def _check_auditor(session: Session, actor: Principal, cube_id: str | None) -> None:
    """Raises NotFound unless the actor may read the audit of the cube, or of everything."""
    if cube_id is None:
        if not actor.admin:
            raise NotFound("audit log", "all")
    elif not (actor.admin and _was_there(session, cube_id)):
        open_cube(session, actor, cube_id, Access.AUDIT)


def _was_there(session: Session, cube_id: str) -> bool:
    """Whether the log speaks of the cube, which may be gone."""
    return session.scalar(_of_cube(cube_id).limit(1)) is not None


def _head(session: Session) -> AuditHead:
    row = session.scalar(select(AuditHeadRow))
    return AuditHead() if row is None else AuditHead(row.seq, row.hash)


def _stored(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds")
