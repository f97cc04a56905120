"""What a chat asks of the catalog and leaves behind: snapshots, artifacts, usage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Row, Select, delete, insert, select
from sqlalchemy.orm import Session

from memos_vllm.control.access import cubes_for, open_cube, require_id
from memos_vllm.control.batches import in_parts
from memos_vllm.control.calls import exactly_once, repeatable
from memos_vllm.control.composition import (
    artifacts_of,
    bakeable,
    compositions,
    in_prefix_ever,
    is_current,
    load_artifacts,
)
from memos_vllm.control.service import Service
from memos_vllm.control.tables import (
    ArtifactMemoryRow,
    ArtifactRow,
    CubeRow,
    CubeUsageRow,
    MemoryRow,
    MemoryUsageRow,
)
from memos_vllm.domain.access import SYSTEM, Access, Principal
from memos_vllm.domain.artifact import ActivationState, ArtifactRecord
from memos_vllm.domain.cube import CubeSnapshot, HeldSnapshot, SnapshotMemory
from memos_vllm.domain.ids import CubeId, MemoryId
from memos_vllm.domain.memory import MemoryState, Tier
from memos_vllm.domain.usage import UsageEvent
from memos_vllm.errors import Conflict, NotFound


class ChatService(Service):
    """The chat path's part of `Mos`. Artifacts and usage come from the engine, not a caller."""

    def snapshots(self, actor: Principal, cube_ids: Sequence[str]) -> list[CubeSnapshot]:
        """The cubes' activation memory, in the order asked for, from one state of the catalog.

        Raises:
            NotFound: the first cube that the actor may not read.
        """
        now = self._clock()
        found = self.changed_snapshots(actor, cube_ids, known={})
        return [held.at(now) for held in found if held is not None]

    def changed_snapshots(
        self, actor: Principal, cube_ids: Sequence[str], *, known: Mapping[str, int]
    ) -> list[HeldSnapshot | None]:
        """As `snapshots`, but None for each cube whose version the caller knows already.

        A cube that did not change costs its part of one SELECT.

        Args:
            known: versions by cube id.
        Raises:
            NotFound: the first cube that the actor may not read.
        """
        for cube_id in cube_ids:
            require_id("memcube", cube_id)
        query = select(CubeRow.id, CubeRow.version).where(
            CubeRow.id.in_(set(cube_ids)), cubes_for(actor, Access.READ)
        )
        with self._catalog.read() as session:
            versions = {row.id: row.version for row in session.execute(query)}
            for cube_id in cube_ids:
                if cube_id not in versions:
                    raise NotFound("memcube", cube_id)
            loaded = {
                cube_id: _load_cube(session, cube_id)
                for cube_id, version in versions.items()
                if known.get(cube_id) != version
            }
        return [loaded.get(cube_id) for cube_id in cube_ids]

    def snapshot_with(self, cube_id: str, memory_ids: Sequence[str] | None) -> CubeSnapshot:
        """The cube as if these memories (None: all that may be) were activation memory.

        What may not be, is unknown or lies elsewhere is left out.

        Raises:
            NotFound: the cube.
        """
        (snapshot,) = self.snapshots(SYSTEM, [cube_id])
        wanted = (
            _members()
            .where(
                MemoryRow.cube_id == cube_id,
                bakeable(self._clock()),
                MemoryRow.tier != Tier.ACTIVATION,
            )
            .order_by(MemoryRow.seq)
        )
        with self._catalog.read() as session:
            if memory_ids is None:
                found = _to_members(session.execute(wanted).all())
            else:
                by_id = {
                    member.id: member
                    for part in in_parts(memory_ids)
                    for member in _to_members(
                        session.execute(wanted.where(MemoryRow.id.in_(part))).all()
                    )
                }
                found = tuple(by_id[MemoryId(one)] for one in memory_ids if one in by_id)
        return replace(snapshot, memories=(*snapshot.memories, *found))

    def require_writable(self, actor: Principal, cube_id: str) -> None:
        """Raises NotFound when the actor may not write to the cube."""
        with self._catalog.read() as session:
            open_cube(session, actor, cube_id, Access.WRITE)

    @repeatable
    def record_artifact(self, record: ArtifactRecord) -> None:
        """Make an artifact that the store now holds known, or known again under the same id.

        It counts as ready only when it holds the cube's composition of this moment.

        Raises:
            NotFound: the cube, or a memory it was made of, is gone: remove the file.
            Conflict: the id belongs to another cube.
        """
        now = self._clock()
        with self._catalog.write() as session:
            cube = session.get(CubeRow, record.cube_id)
            if cube is None:
                raise NotFound("memcube", record.cube_id)
            known = session.get(ArtifactRow, record.id)
            if known is not None and known.cube_id != record.cube_id:
                raise Conflict(f"artifact '{record.id}' belongs to another memcube")
            seqs = _memory_seqs(session, record)
            current = is_current(
                record,
                composition=compositions(session, [cube.id], now=now).get(cube.id, ()),
                scope_version=cube.scope_version,
            )
            ready = current and record.state is ActivationState.READY
            _put_artifact(
                session,
                record,
                seqs,
                state=ActivationState.READY if ready else ActivationState.STALE,
            )
            if known is None:
                self._log(
                    session,
                    SYSTEM,
                    "artifact.record",
                    cube_id=cube.id,
                    subject=record.id,
                    details={"tokens": record.tokens, "bytes": record.bytes, "current": current},
                    at=now,
                )

    @repeatable
    def forget_artifacts(self, artifact_ids: Sequence[str]) -> int:
        """Drop artifacts that the store no longer holds; returns how many were known."""
        now = self._clock()
        with self._catalog.write() as session:
            rows = session.scalars(
                select(ArtifactRow).where(ArtifactRow.id.in_(list(artifact_ids)))
            ).all()
            for row in rows:
                session.delete(row)
                self._log(
                    session, SYSTEM, "artifact.forget", cube_id=row.cube_id, subject=row.id, at=now
                )
            return len(rows)

    def list_artifacts(self, cube_id: str | None = None) -> list[ArtifactRecord]:
        """Every known artifact, or those of one cube, oldest first."""
        with self._catalog.read() as session:
            if cube_id is not None:
                return artifacts_of(session, [cube_id])
            rows = session.scalars(
                select(ArtifactRow).order_by(ArtifactRow.created_at, ArtifactRow.id)
            )
            return load_artifacts(session, rows.all())

    @exactly_once
    def record_usage(self, events: Sequence[UsageEvent]) -> None:
        """Add up what chats used. Moves no version; what is gone by now is left out."""
        if not events:
            return
        with self._catalog.write() as session:
            cubes = set(
                session.scalars(
                    select(CubeRow.id).where(CubeRow.id.in_({event.cube_id for event in events}))
                )
            )
            alive = [event for event in events if event.cube_id in cubes]
            for event in alive:
                _count_cube(session, event)
            _count_memories(session, alive)


def _load_cube(session: Session, cube_id: str) -> HeldSnapshot:
    name, version, epoch, preamble = session.execute(
        select(CubeRow.name, CubeRow.version, CubeRow.epoch, CubeRow.preamble).where(
            CubeRow.id == cube_id
        )
    ).one()
    members = session.execute(
        _members()
        .where(MemoryRow.cube_id == cube_id, in_prefix_ever())
        .order_by(MemoryRow.position, MemoryRow.seq)
    ).all()
    snapshot = CubeSnapshot(
        id=CubeId(cube_id),
        name=name,
        version=version,
        epoch=epoch,
        preamble=preamble,
        memories=_to_members(members),
        has_plaintext=session.scalar(
            select(MemoryRow.seq)
            .where(
                MemoryRow.cube_id == cube_id,
                MemoryRow.state == MemoryState.ACTIVE,
                MemoryRow.tier == Tier.PLAINTEXT,
            )
            .limit(1)
        )
        is not None,
    )
    return HeldSnapshot(snapshot, tuple(expires_at for *_, expires_at in members))


def _members() -> Select[Any]:
    """What a snapshot says of a memory, and when that ends."""
    return select(
        MemoryRow.id, MemoryRow.version, MemoryRow.text, MemoryRow.source, MemoryRow.expires_at
    )


def _to_members(rows: Sequence[Row[*tuple[Any, ...]]]) -> tuple[SnapshotMemory, ...]:
    return tuple(
        SnapshotMemory(
            id=MemoryId(memory_id),
            version=version,
            text=text,
            title=source.get("title"),
            source_uri=source.get("uri"),
        )
        for memory_id, version, text, source, _ in rows
    )


def _memory_seqs(session: Session, record: ArtifactRecord) -> list[int]:
    wanted = [memory_id for memory_id, _ in record.memory_versions]
    query = select(MemoryRow.id, MemoryRow.seq).where(
        MemoryRow.cube_id == record.cube_id, MemoryRow.id.in_(wanted)
    )
    found = {row.id: row.seq for row in session.execute(query)}
    for memory_id in wanted:
        if memory_id not in found:
            raise NotFound("memory", memory_id)
    return [found[memory_id] for memory_id in wanted]


def _put_artifact(
    session: Session, record: ArtifactRecord, seqs: Sequence[int], *, state: ActivationState
) -> None:
    session.merge(
        ArtifactRow(
            id=record.id,
            cube_id=record.cube_id,
            kind=record.kind,
            head_key=record.head_key,
            scope=record.scope,
            tokens=record.tokens,
            size_bytes=record.bytes,
            state=state,
            cube_version=record.cube_version,
            created_at=record.created_at,
        )
    )
    session.flush()
    session.execute(delete(ArtifactMemoryRow).where(ArtifactMemoryRow.artifact_id == record.id))
    lineage = [
        {
            "artifact_id": record.id,
            "rank": rank,
            "memory_seq": seq,
            "memory_version": version,
        }
        for rank, (seq, (_, version)) in enumerate(zip(seqs, record.memory_versions, strict=True))
    ]
    if lineage:
        session.execute(insert(ArtifactMemoryRow), lineage)


def _count_cube(session: Session, event: UsageEvent) -> None:
    row = session.get(CubeUsageRow, (event.cube_id, event.source))
    if row is None:
        row = CubeUsageRow(
            cube_id=event.cube_id,
            source=event.source,
            hits=0,
            tokens=0,
            cached_tokens=0,
            saved_seconds=0.0,
            last_used_at=event.at,
        )
        session.add(row)
    row.hits += 1
    row.tokens += event.tokens
    row.cached_tokens += event.cached_tokens
    row.saved_seconds += event.saved_seconds
    row.last_used_at = max(row.last_used_at, event.at)


def _count_memories(session: Session, events: Collection[UsageEvent]) -> None:
    hits: dict[str, int] = defaultdict(int)
    last: dict[str, datetime] = {}
    for event in events:
        for memory_id in event.memory_ids:
            hits[memory_id] += 1
            last[memory_id] = max(last.get(memory_id, event.at), event.at)
    query = select(MemoryRow.seq, MemoryRow.id).where(MemoryRow.id.in_(list(hits)))
    known = {row.seq: row.id for row in session.execute(query)}
    counted = {
        row.memory_seq: row
        for row in session.scalars(
            select(MemoryUsageRow).where(MemoryUsageRow.memory_seq.in_(list(known)))
        )
    }
    for seq, used in known.items():
        row = counted.get(seq)
        if row is None:
            row = MemoryUsageRow(memory_seq=seq, hits=0, last_used_at=last[used])
            session.add(row)
        row.hits += hits[used]
        row.last_used_at = max(row.last_used_at, last[used])
