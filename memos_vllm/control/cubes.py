"""Cubes: create, list, read, change, delete, count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from memos_vllm.control.access import (
    OpenCube,
    first_cubes_for,
    open_cube,
    require_own_name,
    visible,
)
from memos_vllm.control.calls import exactly_once
from memos_vllm.control.composition import artifacts_of, in_state, mark_stale, take_artifacts
from memos_vllm.control.idempotency import forget_replies
from memos_vllm.control.indexing import note_gone
from memos_vllm.control.paging import check_limit, cut, text_key
from memos_vllm.control.service import Service, bump, check_version, register
from memos_vllm.control.tables import (
    CubeRow,
    CubeUsageRow,
    GrantRow,
    MemoryRow,
    MemoryTagRow,
    RetiredCubeRow,
)
from memos_vllm.control.views import load_cubes
from memos_vllm.domain.access import Access, Principal, Role
from memos_vllm.domain.artifact import ArtifactRecord, DeletedCube
from memos_vllm.domain.checks import JsonObject, check_words
from memos_vllm.domain.cube import (
    Cube,
    CubePatch,
    CubeStats,
    TierStats,
    checked_cube_patch,
    validate_cube_id,
)
from memos_vllm.domain.ids import CubeId
from memos_vllm.domain.memory import MemoryState, Tier
from memos_vllm.domain.page import Page
from memos_vllm.domain.patch import UNSET
from memos_vllm.errors import Conflict

_LISTING = "cubes"


class CubeService(Service):
    """The cubes' part of `Mos`."""

    @exactly_once
    def create_cube(
        self,
        actor: Principal,
        *,
        cube_id: str | None = None,
        name: str | None = None,
        description: str | None = None,
        preamble: str | None = None,
        labels: Sequence[str] = (),
    ) -> Cube:
        """A new, empty cube that belongs to the actor.

        Args:
            cube_id: made up when None.
            name: the id when None.
            preamble: text before the memories in the prefix.
        Raises:
            InvalidRequest, TooLarge: a field is unusable.
            Conflict: the id is taken.
        """
        chosen = validate_cube_id(self._new_id("cube") if cube_id is None else cube_id)
        words = check_words(labels, param="labels")
        fields = checked_cube_patch(
            CubePatch(
                name=chosen if name is None else name,
                description=description or "",
                preamble=preamble or "",
            )
        )
        assert fields.name is not UNSET
        assert fields.description is not UNSET
        assert fields.preamble is not UNSET
        now = self._clock()
        with self._catalog.write() as session:
            cube = insert_cube(
                session,
                actor,
                cube_id=chosen,
                name=fields.name,
                description=fields.description,
                preamble=fields.preamble,
                labels=words,
                created_at=now,
                at=now,
            )
            self._log(session, actor, "cube.create", cube_id=chosen, at=now)
            session.flush()
            return _load(session, cube, now=now)

    def list_cubes(
        self, actor: Principal, *, limit: int = 50, cursor: str | None = None
    ) -> Page[Cube]:
        """Cubes that the actor may see, by id; raises InvalidRequest for limit or cursor."""
        check_limit(limit)
        after = text_key(_LISTING, cursor)
        found = first_cubes_for(actor, Access.SEE, after=after, most=limit + 1)
        query = select(CubeRow).where(found).order_by(CubeRow.id)
        with self._catalog.read() as session:
            rows, next_cursor = cut(
                session.scalars(query.limit(limit + 1)).all(),
                limit=limit,
                listing=_LISTING,
                key=lambda row: row.id,
            )
            opened = _open_all(session, actor, rows)
            return Page(load_cubes(session, opened, now=self._clock()), next_cursor)

    def get_cube(self, actor: Principal, cube_id: str) -> Cube:
        """The cube; raises NotFound."""
        with self._catalog.read() as session:
            cube = open_cube(session, actor, cube_id, Access.SEE)
            return _load(session, cube, now=self._clock())

    @exactly_once
    def update_cube(
        self, actor: Principal, cube_id: str, patch: CubePatch, *, if_match: int | None = None
    ) -> Cube:
        """Change a cube; a patch that changes nothing moves nothing.

        A new preamble makes its artifacts stale, new labels move the epoch.

        Raises:
            NotFound, StaleVersion, InvalidRequest, TooLarge.
        """
        checked = checked_cube_patch(patch)
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.MANAGE)
            row = cube.row
            check_version(expected=if_match, found=row.version)
            changed = _apply(row, checked)
            if changed:
                rescope = "preamble" in changed or "labels" in changed
                if "labels" in changed:
                    row.epoch += 1
                bump(row, at=now, rescope=rescope)
                if rescope:
                    mark_stale(session, row.id)
                self._log(
                    session,
                    actor,
                    "cube.update",
                    cube_id=row.id,
                    details={"fields": changed, "version": row.version, "epoch": row.epoch},
                    at=now,
                )
                session.flush()
            return _load(session, cube, now=now)

    @exactly_once
    def delete_cube(
        self, actor: Principal, cube_id: str, *, if_match: int | None = None
    ) -> DeletedCube:
        """Remove a cube with its memories, history, jobs and grants; the audit log stays.

        Returns:
            The artifacts whose files the caller has to remove.
        Raises:
            NotFound, StaleVersion.
        """
        now = self._clock()
        with self._catalog.write() as session:
            row = open_cube(session, actor, cube_id, Access.MANAGE).row
            check_version(expected=if_match, found=row.version)
            removed = remove_cube(session, row)
            self._log(
                session, actor, "cube.delete", cube_id=row.id, details=removed.details(), at=now
            )
        self._catalog.scrub()
        return DeletedCube(CubeId(row.id), removed.artifacts)

    def cube_stats(self, actor: Principal, cube_id: str) -> CubeStats:
        """Counts, bytes and savings of a cube; raises NotFound."""
        with self._catalog.read() as session:
            cube = open_cube(session, actor, cube_id, Access.SEE)
            return _stats(session, cube, now=self._clock())


@dataclass(frozen=True, slots=True)
class RemovedCube:
    """A cube that is no longer there.

    Args:
        memories: how many it had.
        artifacts: those whose files have to be removed.
    """

    memories: int
    artifacts: list[ArtifactRecord]

    def details(self) -> JsonObject:
        """For the audit log."""
        return {"memories": self.memories, "artifacts": [record.id for record in self.artifacts]}


def remove_cube(session: Session, row: CubeRow) -> RemovedCube:
    """Remove a cube and all that is in it; whoever calls this logs it, and scrubs afterwards."""
    artifacts = take_artifacts(session, row.id)
    memories = session.scalar(
        select(func.count()).select_from(MemoryRow).where(MemoryRow.cube_id == row.id)
    )
    _retire(session, row)
    session.execute(delete(MemoryTagRow).where(MemoryTagRow.cube_id == row.id))
    session.execute(delete(CubeRow).where(CubeRow.id == row.id))
    forget_replies(session, naming=[row.id])
    note_gone(session, row.id)
    return RemovedCube(memories or 0, artifacts)


def insert_cube(
    session: Session,
    actor: Principal,
    *,
    cube_id: str,
    name: str,
    description: str,
    preamble: str,
    labels: Sequence[str],
    created_at: datetime,
    at: datetime,
) -> OpenCube:
    """A new cube of checked fields that belongs to the actor.

    Raises:
        Forbidden: the id names somebody else's own cube.
        Conflict: the id is taken.
    """
    require_own_name(actor, cube_id)
    if session.get(CubeRow, cube_id) is not None:
        raise Conflict(f"memcube '{cube_id}' exists already; choose another id")
    register(session, actor, at=at)
    before = session.get(RetiredCubeRow, cube_id)
    version = 1 if before is None else before.version + 1
    row = CubeRow(
        id=cube_id,
        name=name,
        description=description,
        preamble=preamble,
        labels=list(labels),
        owner=actor.id,
        version=version,
        epoch=1 if before is None else before.epoch + 1,
        scope_version=version,
        created_at=created_at,
        updated_at=at,
    )
    session.add(row)
    session.flush()
    return OpenCube(row, Role.OWNER, frozenset())


def _load(session: Session, cube: OpenCube, *, now: datetime) -> Cube:
    return load_cubes(session, [cube], now=now)[0]


def _open_all(session: Session, actor: Principal, rows: Sequence[CubeRow]) -> list[OpenCube]:
    grants: dict[str, GrantRow] = {}
    if not actor.admin:
        query = select(GrantRow).where(
            GrantRow.principal_id == actor.id, GrantRow.cube_id.in_([row.id for row in rows])
        )
        grants = {grant.cube_id: grant for grant in session.scalars(query)}
    return [
        OpenCube(row, Role.OWNER, frozenset())
        if actor.admin or row.owner == actor.id
        else OpenCube(row, grants[row.id].role, frozenset(grants[row.id].labels))
        for row in rows
    ]


def _apply(row: CubeRow, patch: CubePatch) -> list[str]:
    """Put the given fields into the row; returns the names of those that differed."""
    changed = []
    for name in ("name", "description", "preamble"):
        value = getattr(patch, name)
        if value is not UNSET and value != getattr(row, name):
            setattr(row, name, value)
            changed.append(name)
    if patch.labels is not UNSET and list(patch.labels) != row.labels:
        row.labels = list(patch.labels)
        changed.append("labels")
    return changed


def _retire(session: Session, row: CubeRow) -> None:
    retired = session.get(RetiredCubeRow, row.id)
    if retired is None:
        retired = RetiredCubeRow(id=row.id)
        session.add(retired)
    retired.version, retired.epoch = row.version, row.epoch
    session.flush()


def _stats(session: Session, cube: OpenCube, *, now: datetime) -> CubeStats:
    loaded = _load(session, cube, now=now)
    sizes = session.execute(
        select(MemoryRow.tier, func.count(), func.sum(MemoryRow.text_bytes))
        .where(visible(cube), in_state(MemoryState.ACTIVE, now))
        .group_by(MemoryRow.tier)
    )
    tiers = {tier: TierStats() for tier in Tier}
    for tier, number, text_bytes in sizes:
        baked = loaded.activation if tier is Tier.ACTIVATION else None
        tiers[tier] = TierStats(
            memories=number,
            text_bytes=int(text_bytes),
            tokens=baked.tokens if baked else 0,
            artifact_bytes=baked.bytes if baked else 0,
        )
    usage = session.scalars(select(CubeUsageRow).where(CubeUsageRow.cube_id == loaded.id)).all()
    return CubeStats(
        cube_id=loaded.id,
        version=loaded.version,
        memories=loaded.memories,
        tiers=tiers,
        artifacts=len(artifacts_of(session, [loaded.id])),
        hits=sum(row.hits for row in usage),
        hits_by_source={row.source: row.hits for row in usage},
        prefill_tokens_saved=sum(row.cached_tokens for row in usage),
        prefill_seconds_saved=sum(row.saved_seconds for row in usage),
        last_used_at=max((row.last_used_at for row in usage), default=None),
    )
