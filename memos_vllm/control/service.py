"""What every part of `Mos` stands on: the catalog, a clock, a source of ids."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from sqlalchemy.orm import Session

from memos_vllm.control import audit
from memos_vllm.control.catalog import Catalog
from memos_vllm.control.tables import CubeRow
from memos_vllm.domain.access import Principal
from memos_vllm.domain.checks import JsonObject
from memos_vllm.errors import StaleVersion


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
