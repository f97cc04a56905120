"""Whose a cube is."""

from __future__ import annotations

from sqlalchemy import delete

from memos_vllm.control.access import open_cube, require_id
from memos_vllm.control.calls import exactly_once
from memos_vllm.control.service import Service, bump, check_version
from memos_vllm.control.tables import GrantRow, PrincipalRow
from memos_vllm.control.views import load_cubes
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.cube import Cube
from memos_vllm.errors import NotFound


class OwnershipService(Service):
    """The part of `Mos` that hands cubes over."""

    @exactly_once
    def move_cube(
        self, actor: Principal, cube_id: str, owner: str, *, if_match: int | None = None
    ) -> Cube:
        """Make another principal the owner. Who owned it keeps what a grant gives them, if any.

        Raises:
            NotFound: the cube, or the new owner, or one that is disabled.
            StaleVersion.
        """
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.MANAGE)
            check_version(expected=if_match, found=cube.row.version)
            principal = session.get(PrincipalRow, require_id("principal", owner))
            if principal is None or principal.disabled_at is not None:
                raise NotFound("principal", owner)
            former = cube.row.owner
            if former != principal.id:
                cube.row.owner = principal.id
                session.execute(
                    delete(GrantRow).where(
                        GrantRow.cube_id == cube.row.id, GrantRow.principal_id == principal.id
                    )
                )
                bump(cube.row, at=now)
                self._log(
                    session,
                    actor,
                    "cube.move",
                    cube_id=cube.row.id,
                    details={"from": former, "to": principal.id, "version": cube.row.version},
                    at=now,
                )
                session.flush()
            # As it is at this moment: afterwards the actor may no longer see it.
            return load_cubes(session, [cube], now=now)[0]
