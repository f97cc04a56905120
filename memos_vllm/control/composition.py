"""A cube's composition: what a bake of it would contain now, and whether an artifact has it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from memos_vllm.control.tables import (
    ArtifactMemoryRow,
    ArtifactRow,
    CubeRow,
    JobRow,
    MemoryLabelRow,
    MemoryRow,
)
from memos_vllm.domain.artifact import ActivationState, ArtifactRecord
from memos_vllm.domain.cube import Activation
from memos_vllm.domain.ids import ArtifactId, CubeId, MemoryId
from memos_vllm.domain.job import JobKind, JobState
from memos_vllm.domain.memory import MemoryState, Tier

MemoryVersions = tuple[tuple[MemoryId, int], ...]

BAKING = (JobKind.BAKE, JobKind.REBUILD)


def bakeable(now: datetime) -> ColumnElement[bool]:
    """Condition on `MemoryRow`: may be in a prefix. Active, unexpired, without any label."""
    return and_(_unlabelled_active(), unexpired(now))


def _unlabelled_active() -> ColumnElement[bool]:
    labelled = (
        select(MemoryLabelRow.label).where(MemoryLabelRow.memory_seq == MemoryRow.seq).exists()
    )
    return and_(MemoryRow.state == MemoryState.ACTIVE, ~labelled)


def expired(now: datetime) -> ColumnElement[bool]:
    """Condition on `MemoryRow`: active as it is written down, and over by now."""
    return and_(MemoryRow.state == MemoryState.ACTIVE, MemoryRow.expires_at <= now)


def in_state(state: MemoryState, now: datetime) -> ColumnElement[bool]:
    """Condition on `MemoryRow`: in this state now; what has expired is archived."""
    written = MemoryRow.state == state
    if state is MemoryState.ACTIVE:
        return and_(written, unexpired(now))
    return or_(written, expired(now)) if state is MemoryState.ARCHIVED else written


def unexpired(now: datetime) -> ColumnElement[bool]:
    """Condition on `MemoryRow`: its time is not over."""
    return or_(MemoryRow.expires_at.is_(None), MemoryRow.expires_at > now)


def in_prefix_ever() -> ColumnElement[bool]:
    """Condition on `MemoryRow`: is in its cube's prefix as long as it has not expired."""
    return and_(MemoryRow.tier == Tier.ACTIVATION, _unlabelled_active())


def in_prefix(now: datetime) -> ColumnElement[bool]:
    """Condition on `MemoryRow`: is in its cube's prefix now."""
    return and_(in_prefix_ever(), unexpired(now))


def compositions(
    session: Session, cube_ids: Collection[str], *, now: datetime
) -> dict[str, MemoryVersions]:
    """Memory and version in prefix order, for each cube that has activation memory."""
    query = (
        select(MemoryRow.cube_id, MemoryRow.id, MemoryRow.version)
        .where(MemoryRow.cube_id.in_(cube_ids), in_prefix(now))
        .order_by(MemoryRow.cube_id, MemoryRow.position, MemoryRow.seq)
    )
    found: dict[str, list[tuple[MemoryId, int]]] = defaultdict(list)
    for cube_id, memory_id, version in session.execute(query):
        found[cube_id].append((MemoryId(memory_id), version))
    return {cube_id: tuple(members) for cube_id, members in found.items()}


def load_artifacts(session: Session, rows: Sequence[ArtifactRow]) -> list[ArtifactRecord]:
    """Rows as records, each with the memories it names."""
    query = (
        select(ArtifactMemoryRow.artifact_id, MemoryRow.id, ArtifactMemoryRow.memory_version)
        .join(MemoryRow, MemoryRow.seq == ArtifactMemoryRow.memory_seq)
        .where(ArtifactMemoryRow.artifact_id.in_([row.id for row in rows]))
        .order_by(ArtifactMemoryRow.artifact_id, ArtifactMemoryRow.rank)
    )
    members: dict[str, list[tuple[MemoryId, int]]] = defaultdict(list)
    if rows:
        for artifact_id, memory_id, version in session.execute(query):
            members[artifact_id].append((MemoryId(memory_id), version))
    return [
        ArtifactRecord(
            id=ArtifactId(row.id),
            cube_id=CubeId(row.cube_id),
            kind=row.kind,
            head_key=row.head_key,
            scope=row.scope,
            tokens=row.tokens,
            bytes=row.size_bytes,
            memory_versions=tuple(members[row.id]),
            state=row.state,
            created_at=row.created_at,
            cube_version=row.cube_version,
        )
        for row in rows
    ]


def artifacts_of(session: Session, cube_ids: Collection[str]) -> list[ArtifactRecord]:
    """Every artifact of these cubes, oldest first."""
    query = (
        select(ArtifactRow)
        .where(ArtifactRow.cube_id.in_(cube_ids))
        .order_by(ArtifactRow.created_at, ArtifactRow.id)
    )
    return load_artifacts(session, session.scalars(query).all())


def is_current(record: ArtifactRecord, *, composition: MemoryVersions, scope_version: int) -> bool:
    """Whether an artifact holds exactly this composition, in the cube's present scope."""
    return (
        bool(composition)
        and record.memory_versions == composition
        and (record.cube_version is None or record.cube_version >= scope_version)
    )


def activations(
    session: Session, cubes: Sequence[CubeRow], *, now: datetime
) -> dict[str, Activation]:
    """The state of each cube's activation memory, in three queries for all of them."""
    composed = compositions(session, [cube.id for cube in cubes], now=now)
    busy = set(
        session.scalars(
            select(JobRow.cube_id).where(
                JobRow.cube_id.in_(list(composed)),
                JobRow.kind.in_(BAKING),
                JobRow.state.in_((JobState.QUEUED, JobState.RUNNING)),
            )
        )
    )
    current: dict[str, list[ArtifactRecord]] = defaultdict(list)
    versions = {cube.id: cube.scope_version for cube in cubes}
    for record in artifacts_of(session, list(composed)):
        if record.state is ActivationState.READY and is_current(
            record,
            composition=composed[record.cube_id],
            scope_version=versions[record.cube_id],
        ):
            current[record.cube_id].append(record)
    return {
        cube.id: _activation(
            has_memory=cube.id in composed, busy=cube.id in busy, current=current[cube.id]
        )
        for cube in cubes
    }


def _activation(*, has_memory: bool, busy: bool, current: list[ArtifactRecord]) -> Activation:
    if not has_memory:
        return Activation()
    if current:
        return Activation(
            state=ActivationState.READY,
            tokens=current[-1].tokens,
            bytes=sum(record.bytes for record in current),
        )
    return Activation(state=ActivationState.BAKING if busy else ActivationState.STALE)


def mark_stale(session: Session, cube_id: str, *, memory_seqs: Iterable[int] | None = None) -> None:
    """Mark the cube's artifacts as out of date: all, or those that name one of the memories."""
    change = update(ArtifactRow).where(ArtifactRow.cube_id == cube_id)
    if memory_seqs is not None:
        naming = select(ArtifactMemoryRow.artifact_id).where(
            ArtifactMemoryRow.memory_seq.in_(list(memory_seqs))
        )
        change = change.where(ArtifactRow.id.in_(naming))
    session.execute(change.values(state=ActivationState.STALE))


def take_artifacts(session: Session, cube_id: str) -> list[ArtifactRecord]:
    """Remove every artifact of the cube from the catalog and return what they were."""
    records = artifacts_of(session, [cube_id])
    session.execute(delete(ArtifactRow).where(ArtifactRow.cube_id == cube_id))
    return records


def next_position(session: Session, cube_id: str) -> int:
    """The place after the last memory that has one, archived ones included."""
    last = session.scalar(select(func.max(MemoryRow.position)).where(MemoryRow.cube_id == cube_id))
    return (last or 0) + 1
