"""Where access to cubes and memories is decided, as parts of the queries themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import ColumnElement, and_, or_, select, true
from sqlalchemy.orm import Session

from memos_vllm.control.sql import one_of, unindexed
from memos_vllm.control.tables import CubeRow, GrantRow, MemoryLabelRow, MemoryRow
from memos_vllm.domain.access import Access, Principal, Role, allows, roles_that_allow
from memos_vllm.errors import NotFound

# Of ids that come from a URL; anything else names nothing, and may not even be encodable.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class OpenCube:
    """A cube that the actor may use, its role there and the labels it may see."""

    row: CubeRow
    role: Role
    labels: frozenset[str]

    @property
    def cube_id(self) -> str:
        return self.row.id


class SeenCube(Protocol):
    """A cube as somebody sees it: all of it for an owner, else what these labels leave open."""

    @property
    def cube_id(self) -> str: ...
    @property
    def role(self) -> Role: ...
    @property
    def labels(self) -> frozenset[str]: ...


def require_id(kind: str, value: str) -> str:
    """`value` itself when an id can look so; raises NotFound."""
    if _ID.fullmatch(value) is None:
        raise NotFound(kind, value.encode("ascii", "replace").decode()[:64])
    return value


def open_cube(session: Session, actor: Principal, cube_id: str, access: Access) -> OpenCube:
    """The cube, when `actor` may do `access` to it.

    Raises:
        NotFound: no such cube, or not for this actor; one answer for both.
    """
    require_id("memcube", cube_id)
    row = session.get(CubeRow, cube_id)
    opened = None if row is None else _role(session, actor, row)
    if opened is None or not allows(opened.role, access):
        raise NotFound("memcube", cube_id)
    return opened


def _role(session: Session, actor: Principal, row: CubeRow) -> OpenCube | None:
    if actor.admin or row.owner == actor.id:
        return OpenCube(row, Role.OWNER, frozenset())
    grant = session.get(GrantRow, (row.id, actor.id))
    return None if grant is None else OpenCube(row, grant.role, frozenset(grant.labels))


def cubes_for(actor: Principal, access: Access) -> ColumnElement[bool]:
    """Condition on `CubeRow`: the actor may do `access` to it."""
    if actor.admin:
        return true()
    granted = select(GrantRow.cube_id).where(
        GrantRow.principal_id == actor.id, GrantRow.role.in_(roles_that_allow(access))
    )
    return or_(CubeRow.owner == actor.id, CubeRow.id.in_(granted))


def visible(cube: SeenCube, *, by_number: bool = False) -> ColumnElement[bool]:
    """Condition on `MemoryRow`: of this cube, and under no label that the actor lacks.

    Args:
        by_number: whether the memories asked for are named, by `seq` or id, in the same query.
    """
    here = (unindexed(MemoryRow.cube_id) if by_number else MemoryRow.cube_id) == cube.cube_id
    if cube.role is Role.OWNER:
        return here
    return and_(here, ~_under_label(MemoryLabelRow.label.not_in(sorted(cube.labels))))


def foreign_label() -> ColumnElement[bool]:
    """Condition on `MemoryRow`: under a label that is none of the parameter "labels"."""
    return _under_label(~one_of(MemoryLabelRow.label, "labels"))


def _under_label(which: ColumnElement[bool]) -> ColumnElement[bool]:
    """Condition on `MemoryRow`: it has such a label."""
    labels = select(MemoryLabelRow.label)
    return labels.where(MemoryLabelRow.memory_seq == MemoryRow.seq, which).exists()


def open_memory(session: Session, cube: OpenCube, memory_id: str) -> MemoryRow:
    """The memory, when the actor may see it; raises NotFound."""
    require_id("memory", memory_id)
    row = session.scalar(select(MemoryRow).where(MemoryRow.id == memory_id, visible(cube)))
    if row is None:
        raise NotFound("memory", memory_id)
    return row


def open_memories(session: Session, cube: OpenCube, memory_ids: list[str]) -> list[MemoryRow]:
    """The memories in the order asked for; raises NotFound for the first that is not visible."""
    for memory_id in memory_ids:
        require_id("memory", memory_id)
    rows = session.scalars(
        select(MemoryRow).where(MemoryRow.id.in_(memory_ids), visible(cube, by_number=True))
    )
    by_id = {row.id: row for row in rows}
    for memory_id in memory_ids:
        if memory_id not in by_id:
            raise NotFound("memory", memory_id)
    return [by_id[memory_id] for memory_id in memory_ids]
