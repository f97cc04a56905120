"""Expiry: what is over is written down as archived."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime

from sqlalchemy import select

from memos_vllm.control.access import OpenCube
from memos_vllm.control.calls import repeatable
from memos_vllm.control.composition import expired, mark_stale
from memos_vllm.control.memory_writes import record_versions
from memos_vllm.control.service import Service, bump
from memos_vllm.control.tables import CubeRow, MemoryRow
from memos_vllm.domain.access import SYSTEM, Role
from memos_vllm.domain.memory import MemoryChange, MemoryState

# About half a second in which other writers wait, if that much ever expires at once.
MAX_AT_ONCE = 500


class ExpiryService(Service):
    """The expiry's part of `Mos`."""

    @repeatable
    def archive_expired(self, limit: int = MAX_AT_ONCE) -> int:
        """Archive memories whose time is over, the longest ago first; in one transaction.

        Nobody was shown them as active since: this keeps the version that says when and why, and
        lets the index forget them.

        Returns:
            How many were archived; `limit` when there may be more.
        """
        now = self._clock()
        due = select(MemoryRow).where(expired(now)).order_by(MemoryRow.expires_at, MemoryRow.seq)
        with self._catalog.read() as session:
            # Most calls find nothing, and then need no write lock.
            if session.scalar(due.with_only_columns(MemoryRow.seq).limit(1)) is None:
                return 0
        with self._catalog.write() as session:
            rows = session.scalars(due.limit(limit)).all()
            by_cube: dict[str, list[MemoryRow]] = defaultdict(list)
            for row in rows:
                by_cube[row.cube_id].append(row)
            for cube_id, members in by_cube.items():
                cube = session.get_one(CubeRow, cube_id)
                bump(cube, at=now)
                mark_stale(session, cube_id, memory_seqs=[row.seq for row in members])
                for row in members:
                    assert row.expires_at is not None, "only what expires has expired"
                    row.state = MemoryState.ARCHIVED
                    record_versions(
                        session,
                        OpenCube(cube, Role.OWNER, frozenset()),
                        [row],
                        MemoryChange.ARCHIVED,
                        actor=SYSTEM,
                        reason=f"expired at {_shown(row.expires_at)}",
                        at=now,
                    )
                    self._log(
                        session,
                        SYSTEM,
                        "memory.expire",
                        cube_id=cube_id,
                        subject=row.id,
                        details={
                            "expired_at": _shown(row.expires_at),
                            "memory_version": row.version,
                            "version": cube.version,
                        },
                        at=now,
                    )
            return len(rows)


def _shown(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
