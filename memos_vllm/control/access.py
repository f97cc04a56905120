"""Where access to cubes and memories is decided, as parts of the queries themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import ColumnElement, Select, and_, or_, select, true, union_all
from sqlalchemy.orm import Session

from memos_vllm.control.sql import one_of, unindexed
from memos_vllm.control.tables import CubeRow, GrantRow, MemoryLabelRow, MemoryRow
from memos_vllm.domain.access import Access, Principal, Role, allows, roles_that_allow, sees_labels
from memos_vllm.errors import Forbidden, InvalidRequest, NotFound

# Of ids that come from a URL; anything else names nothing, and may not even be encodable.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


# Of ids that say whose cube it is; the client's sessions rely on them.
_OWN_KINDS = ("user", "agent")


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


def listing_of(kind: str, cube_id: str) -> str:
    """What a cube's list of this kind is called in its cursors; raises NotFound."""
    return f"{kind}/{require_id('memcube', cube_id)}"


def require_admin(actor: Principal, what: str) -> None:
    """Raises Forbidden unless the actor is an administrator; for what belongs to no cube."""
    if not actor.admin:
        raise Forbidden(what)


def require_own_name(actor: Principal, cube_id: str) -> None:
    """Raises Forbidden when the id names somebody else's own cube, such as `user.ann`.

    What ann says in sessions goes there, so nobody may have made it before her.
    """
    kind, _, name = cube_id.partition(".")
    if kind in _OWN_KINDS and name and actor.id not in (name, cube_id):
        require_admin(actor, f"making a cube that is called after another {kind}")


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
    """Condition on `CubeRow`: the actor may do `access` to it.

    Asked of each cube that the query has come to by other ways, so that it costs the same however
    many cubes the actor has a grant on.
    """
    if actor.admin:
        return true()
    granted = _granted(actor, access).where(GrantRow.cube_id == CubeRow.id).exists()
    return or_(CubeRow.owner == actor.id, granted)


def first_cubes_for(
    actor: Principal, access: Access, *, after: str | None, most: int
) -> ColumnElement[bool]:
    """Condition on `CubeRow`: among the first cubes that the actor may do `access` to, by id.

    It is neither asked of every cube there is, nor are all read that the actor has a grant on.

    Args:
        after: only ids beyond this one.
    """
    beyond = CubeRow.id > after if after is not None else true()
    if actor.admin:
        return beyond
    granted = _granted(actor, access)
    if after is not None:
        granted = granted.where(GrantRow.cube_id > after)
    own = select(CubeRow.id).where(CubeRow.owner == actor.id, beyond)
    first = (
        own.order_by(CubeRow.id).limit(most).subquery(),
        granted.order_by(GrantRow.cube_id).limit(most).subquery(),
    )
    return CubeRow.id.in_(union_all(*(select(*one.columns) for one in first)))


def _granted(actor: Principal, access: Access) -> Select[str]:
    return select(GrantRow.cube_id).where(
        GrantRow.principal_id == actor.id, GrantRow.role.in_(roles_that_allow(access))
    )


def visible(cube: SeenCube, *, by_number: bool = False) -> ColumnElement[bool]:
    """Condition on `MemoryRow`: of this cube, and under no label that the actor lacks.

    Args:
        by_number: whether the memories asked for are named, by `seq` or id, in the same query.
    """
    here = (unindexed(MemoryRow.cube_id) if by_number else MemoryRow.cube_id) == cube.cube_id
    if cube.role is Role.OWNER:
        return here
    return and_(here, ~_under_label(MemoryLabelRow.label.not_in(sorted(cube.labels))))


def require_labels(cube: OpenCube, labels: Sequence[str]) -> None:
    """Raises InvalidRequest unless the actor may put a memory under these labels.

    Whoever writes sets and removes the labels that its grant holds, an owner any. What is under
    another label is not seen, so that nobody can take it off.
    """
    if not sees_labels(cube.role, cube.labels, labels):
        raise InvalidRequest(
            "your grant on this memcube does not hold every one of these labels; an owner can "
            "give them to you",
            param="labels",
        )


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
