"""Grants: share a cube with a principal, take it back, and say who has it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from memos_vllm.control.access import listing_of, open_cube, require_id
from memos_vllm.control.calls import exactly_once
from memos_vllm.control.idempotency import drop_replies
from memos_vllm.control.paging import check_limit, cut, text_key
from memos_vllm.control.service import Service, register
from memos_vllm.control.tables import CubeRow, GrantRow, PrincipalRow
from memos_vllm.domain.access import (
    LOCAL_ADMIN,
    Access,
    Grant,
    Principal,
    Role,
    allows,
    check_principal_id,
)
from memos_vllm.domain.checks import check_words
from memos_vllm.domain.ids import CubeId, PrincipalId
from memos_vllm.domain.page import Page
from memos_vllm.errors import Conflict, NotFound

_LISTING = "grants"


class GrantService(Service):
    """The grants' part of `Mos`.

    Every other call looks at the grants in its own query, so what is given or taken counts from
    the next call on. No grant moves the cube's version or epoch.
    """

    def principal(self, principal_id: str) -> Principal:
        """Who has this id, for work that goes on in its name; raises NotFound."""
        if principal_id == LOCAL_ADMIN.id:
            return LOCAL_ADMIN
        with self._catalog.read() as session:
            row = session.get(PrincipalRow, principal_id)
        if row is None or row.disabled_at is not None:
            raise NotFound("principal", principal_id)
        return Principal(PrincipalId(row.id), row.kind, row.admin)

    @exactly_once
    def put_grant(
        self,
        actor: Principal,
        cube_id: str,
        principal: str,
        *,
        role: Role,
        labels: Sequence[str] = (),
    ) -> Grant:
        """Give a principal this role and these labels, in the place of what it had.

        A cube always has an owner: when `owner` itself gets a lesser role, the cube passes to
        whoever has been owner by grant for longest.

        Args:
            principal: need not have a key yet.
        Raises:
            NotFound: the cube, or the actor may not manage it.
            InvalidRequest: the principal's id or a label.
            Conflict: the cube would be left without an owner.
        """
        grantee = check_principal_id(principal)
        words = check_words(labels, param="labels")
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.MANAGE).row
            if cube.owner == grantee:
                if role is Role.OWNER:
                    return _of_owner(cube)
                _hand_over(session, cube)
            known = session.get(GrantRow, (cube.id, grantee))
            if known is not None and (known.role, known.labels) == (role, list(words)):
                return _to_grant(known)
            register(session, Principal(grantee), at=now)
            if known is not None:
                drop_replies(session, given_to=grantee, naming=cube.id)
            given = session.merge(
                GrantRow(
                    cube_id=cube.id,
                    principal_id=grantee,
                    role=role,
                    labels=list(words),
                    granted_by=actor.id,
                    granted_at=now,
                )
            )
            self._log(
                session,
                actor,
                "grant.put",
                cube_id=cube.id,
                subject=grantee,
                details={"role": role.value, "labels": list(words), "owner": cube.owner},
                at=now,
            )
            return _to_grant(given)

    @exactly_once
    def delete_grant(self, actor: Principal, cube_id: str, principal: str) -> None:
        """Take a principal's grant away; its stored answers about the cube go with it.

        When it is the cube's `owner`, the cube passes to whoever has been owner by grant for
        longest.

        Raises:
            NotFound: the cube, or the actor may not manage it, or there is no such grant.
            Conflict: it is the last owner.
        """
        require_id("grant", principal)
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.MANAGE).row
            if cube.owner == principal:
                _hand_over(session, cube)
            else:
                known = session.get(GrantRow, (cube.id, principal))
                if known is None:
                    raise NotFound("grant", principal)
                session.delete(known)
            drop_replies(session, given_to=principal, naming=cube.id)
            self._log(
                session,
                actor,
                "grant.delete",
                cube_id=cube.id,
                subject=principal,
                details={"owner": cube.owner},
                at=now,
            )

    def list_grants(
        self, actor: Principal, cube_id: str, *, limit: int = 50, cursor: str | None = None
    ) -> Page[Grant]:
        """All grants of a cube for who manages it, else the actor's own; by principal.

        Raises:
            NotFound: the cube.
            InvalidRequest: limit or cursor.
        """
        check_limit(limit)
        listing = listing_of(_LISTING, cube_id)
        after = text_key(listing, cursor) or ""
        with self._catalog.read() as session:
            cube = open_cube(session, actor, cube_id, Access.SEE)
            wanted = select(GrantRow).where(GrantRow.cube_id == cube.cube_id)
            if allows(cube.role, Access.MANAGE):
                grants = [_of_owner(cube.row), *map(_to_grant, session.scalars(wanted))]
            else:
                own = wanted.where(GrantRow.principal_id == actor.id)
                grants = [_to_grant(row) for row in session.scalars(own)]
        # Sorted here: the owner has no row, and databases do not agree on the order of letters.
        grants.sort(key=lambda one: one.principal)
        left = [one for one in grants if one.principal > after][: limit + 1]
        shown, next_cursor = cut(left, limit=limit, listing=listing, key=lambda one: one.principal)
        return Page(shown, next_cursor)


def _hand_over(session: Session, cube: CubeRow) -> None:
    """Make the owner by grant who has been one longest the cube's `owner`; raises Conflict."""
    heir = session.scalar(
        select(GrantRow)
        .where(GrantRow.cube_id == cube.id, GrantRow.role == Role.OWNER)
        .order_by(GrantRow.granted_at, GrantRow.principal_id)
        .limit(1)
    )
    if heir is None:
        raise Conflict(
            f"'{cube.owner}' is the last owner of memcube '{cube.id}'; make somebody else an "
            "owner first"
        )
    cube.owner = heir.principal_id
    session.delete(heir)
    session.flush()


def _of_owner(cube: CubeRow) -> Grant:
    owner = PrincipalId(cube.owner)
    return Grant(
        cube_id=CubeId(cube.id),
        principal=owner,
        role=Role.OWNER,
        labels=(),
        granted_by=owner,
        granted_at=cube.created_at,
    )


def _to_grant(row: GrantRow) -> Grant:
    return Grant(
        cube_id=CubeId(row.cube_id),
        principal=PrincipalId(row.principal_id),
        role=row.role,
        labels=tuple(row.labels),
        granted_by=PrincipalId(row.granted_by),
        granted_at=row.granted_at,
    )
