"""What every part of `Mos` stands on: the catalog, a clock, a source of ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Protocol, Self

from sqlalchemy.orm import Session

from memos_vllm.control import audit
from memos_vllm.control.catalog import Catalog
from memos_vllm.control.tables import CubeRow, PrincipalRow
from memos_vllm.domain.access import Principal
from memos_vllm.domain.checks import JsonObject
from memos_vllm.domain.ids import IdSource, PrincipalId
from memos_vllm.errors import StaleVersion

# Ids and labels in one row about a reading; the row counts all.
MAX_LOGGED = 100


class Labelled(Protocol):
    """A memory or a version of one, as far as the log speaks of it."""

    @property
    def id(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...


class Service:
    """Base of the parts of `Mos`; see there."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        clock: Callable[[], datetime],
        new_id: Callable[[str], str],
    ) -> None:
        self._catalog = catalog
        self._clock = clock
        self._new_id = new_id

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the catalog at a SQLAlchemy URL, create and migrate it if need be.

        Raises:
            ConfigurationError: the URL cannot be used, or the catalog is newer than this code.
        """
        return cls(Catalog.open(url), clock=lambda: datetime.now(UTC), new_id=IdSource())

    def close(self) -> None:
        """Close the catalog's idle connections."""
        self._catalog.close()

    def _log(
        self,
        session: Session,
        actor: Principal,
        action: str,
        *,
        cube_id: str | None,
        subject: str | None = None,
        details: JsonObject | None = None,
        at: datetime,
    ) -> None:
        audit.append(
            session,
            at=at,
            actor=actor.id,
            action=action,
            cube_id=cube_id,
            subject=subject,
            details=details,
        )

    def _log_read(
        self, session: Session, reader: PrincipalId, cube_id: str, memories: Sequence[Labelled]
    ) -> None:
        """Note in the log that somebody was given labelled memories, in one row for all of them."""
        found = [memory for memory in memories if memory.labels]
        if not found:
            return
        ids = list(dict.fromkeys(memory.id for memory in found))
        labels = sorted({label for memory in found for label in memory.labels})
        self._log(
            session,
            Principal(reader),
            "memory.read",
            cube_id=cube_id,
            subject=ids[0] if len(ids) == 1 else None,
            details={
                "memories": ids[:MAX_LOGGED],
                "count": len(ids),
                "labels": labels[:MAX_LOGGED],
            },
            at=self._clock(),
        )

    def _note_read(self, reader: PrincipalId, cube_id: str, memories: Sequence[Labelled]) -> None:
        """As `_log_read`, in a transaction of its own, and without one when none has a label.

        It is written before the answer is given: what is only in memory is lost by a crash, and
        then somebody has read what nobody knows of.
        """
        if any(memory.labels for memory in memories):
            with self._catalog.write() as session:
                self._log_read(session, reader, cube_id, memories)


def bump(cube: CubeRow, *, at: datetime, rescope: bool = False) -> None:
    """Move a cube's version, once per transaction.

    Args:
        rescope: the preamble or the epoch changed, so nothing baked before is of use.
    """
    cube.version += 1
    cube.updated_at = at
    if rescope:
        cube.scope_version = cube.version


def check_version(*, expected: int | None, found: int) -> None:
    """Raises StaleVersion when the caller expected another version."""
    if expected is not None and expected != found:
        raise StaleVersion(expected=expected, found=found)


def register(session: Session, principal: Principal, *, at: datetime) -> None:
    """Make sure that cubes and grants can name the principal."""
    if session.get(PrincipalRow, principal.id) is None:
        session.add(
            PrincipalRow(
                id=principal.id,
                kind=principal.kind,
                name=principal.id,
                admin=principal.admin,
                created_at=at,
            )
        )
        session.flush()
