"""Reading the audit log."""

from __future__ import annotations

from sqlalchemy import select

from memos_vllm.control.access import open_cube, require_id
from memos_vllm.control.audit import to_entry, verify
from memos_vllm.control.paging import check_limit, cut, number_key
from memos_vllm.control.service import Service
from memos_vllm.control.tables import AuditRow
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.audit import AuditEntry, AuditVerdict
from memos_vllm.domain.page import Page
from memos_vllm.errors import NotFound

_LISTING = "audit"


class LogService(Service):
    """The audit log's part of `Mos`."""

    def audit_entries(
        self,
        actor: Principal,
        cube_id: str | None = None,
        *,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page[AuditEntry]:
        """Entries, newest first; an administrator also reads those of cubes that are gone.

        Args:
            cube_id: None for the whole log, which only an administrator may read.
        Raises:
            NotFound: no such cube, or not for this actor.
            InvalidRequest: limit or cursor.
        """
        check_limit(limit)
        before = number_key(_LISTING, cursor)
        wanted = select(AuditRow).order_by(AuditRow.seq.desc()).limit(limit + 1)
        if before is not None:
            wanted = wanted.where(AuditRow.seq < before)
        if cube_id is None:
            if not actor.admin:
                raise NotFound("audit log", "all")
        else:
            wanted = wanted.where(AuditRow.cube_id == require_id("memcube", cube_id))
        with self._catalog.read() as session:
            rows = session.scalars(wanted).all()
            if cube_id is not None and not (actor.admin and rows):
                open_cube(session, actor, cube_id, Access.AUDIT)
            shown, next_cursor = cut(rows, limit=limit, listing=_LISTING, key=lambda row: row.seq)
            return Page([to_entry(row) for row in shown], next_cursor)

    def verify_audit(self) -> AuditVerdict:
        """Read the whole log and name the first row that breaks the chain, if one does."""
        with self._catalog.read() as session:
            return verify(session)
