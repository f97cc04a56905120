"""Rows of the catalog as the domain's objects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    String,
    and_,
    bindparam,
    func,
    null,
    or_,
    select,
    type_coerce,
    union_all,
)
from sqlalchemy.orm import Session

from memos_vllm.control.access import OpenCube, SeenCube, foreign_label, visible
from memos_vllm.control.batches import in_parts
from memos_vllm.control.composition import activations, expired
from memos_vllm.control.sql import Prepared, one_of, unindexed
from memos_vllm.control.tables import (
    EdgeRow,
    JobRow,
    LineageRow,
    MemoryRow,
    MemoryUsageRow,
    MemoryVersionRow,
)
from memos_vllm.domain.access import Role, sees_labels
from memos_vllm.domain.cube import Cube, count_states, count_tiers
from memos_vllm.domain.erasure import Proof, Removed
from memos_vllm.domain.ids import CubeId, JobId, MemoryId, PrincipalId
from memos_vllm.domain.job import Job
from memos_vllm.domain.memory import (
    Edge,
    Lineage,
    Memory,
    MemoryState,
    MemoryVersion,
    Relation,
    Source,
    Tier,
    Usage,
)

Counts = Mapping[tuple[MemoryState, Tier], int]


def source_to_json(source: Source) -> dict[str, Any]:
    """A source as it is stored."""
    return {
        "kind": source.kind,
        "uri": source.uri,
        "title": source.title,
        "author": source.author,
        "created_at": None if source.created_at is None else source.created_at.isoformat(),
        "locator": source.locator,
    }


def source_from_json(stored: Mapping[str, Any]) -> Source:
    """A stored source."""
    created_at = stored.get("created_at")
    return Source(
        kind=stored["kind"],
        uri=stored.get("uri"),
        title=stored.get("title"),
        author=stored.get("author"),
        created_at=None if created_at is None else datetime.fromisoformat(created_at),
        locator=stored.get("locator"),
    )


_USAGE = Prepared(
    select(MemoryUsageRow.memory_seq, MemoryUsageRow.hits, MemoryUsageRow.last_used_at).where(
        one_of(MemoryUsageRow.memory_seq, "seqs")
    )
)


def load_memories(session: Session, cube: SeenCube, rows: Sequence[MemoryRow]) -> list[Memory]:
    """Rows of one cube with edges, lineage and usage, in two queries for all of them.

    Edges and lineage to a memory that the actor may not see are left out.
    """
    seqs = [row.seq for row in rows]
    edges, lineage = _relations(session, cube, seqs)
    usage = {
        seq: Usage(hits=hits, last_used_at=at)
        for seq, hits, at in _USAGE.rows(session, {"seqs": seqs})
    }
    return [
        to_memory(
            row,
            edges=edges.get(row.seq, ()),
            lineage=lineage.get(row.seq, Lineage()),
            usage=usage.get(row.seq, Usage()),
        )
        for row in rows
    ]


def to_memory(row: MemoryRow, *, edges: tuple[Edge, ...], lineage: Lineage, usage: Usage) -> Memory:
    """A row and what belongs to it."""
    return Memory(
        id=MemoryId(row.id),
        cube_id=CubeId(row.cube_id),
        text=row.text,
        tags=tuple(row.tags),
        labels=tuple(row.labels),
        metadata=row.attributes,
        source=source_from_json(row.source),
        state=row.state,
        tier=row.tier,
        version=row.version,
        lineage=lineage,
        edges=edges,
        created_by=PrincipalId(row.created_by),
        created_at=row.created_at,
        updated_at=row.updated_at,
        expires_at=row.expires_at,
        usage=usage,
        position=row.position,
    )


@cache
def _all_relations(labelled: bool) -> Prepared:
    """Edges and lineage of some memories, the latter without a weight; built once."""
    edges = (
        select(
            EdgeRow.memory_seq.label("origin"),
            EdgeRow.kind,
            MemoryRow.id,
            EdgeRow.weight,
            EdgeRow.rank.label("place"),
        )
        .join(MemoryRow, MemoryRow.seq == EdgeRow.target_seq)
        .where(one_of(EdgeRow.memory_seq, "seqs"))
    )
    lineage = (
        select(
            LineageRow.memory_seq,
            # As text: in a union, SQLAlchemy reads both by the first one's type.
            type_coerce(LineageRow.relation, String),
            MemoryRow.id,
            null(),
            MemoryRow.seq,
        )
        .join(MemoryRow, MemoryRow.seq == LineageRow.target_seq)
        .where(one_of(LineageRow.memory_seq, "seqs"))
    )
    here = unindexed(MemoryRow.cube_id) == bindparam("cube")
    seen = and_(here, ~foreign_label()) if labelled else here
    # A memory that was kept from another cube has its origin's labels: who sees it may know that.
    kept = and_(~here, LineageRow.relation == Relation.DERIVED_FROM)
    both: CompoundSelect[Any] = union_all(edges.where(seen), lineage.where(or_(seen, kept)))
    return Prepared(both.order_by("origin", "place"))


def _relations(
    session: Session, cube: SeenCube, seqs: list[int]
) -> tuple[dict[int, tuple[Edge, ...]], dict[int, Lineage]]:
    labelled = cube.role is not Role.OWNER
    asked: dict[str, Any] = {"seqs": seqs, "cube": cube.cube_id}
    if labelled:
        asked["labels"] = sorted(cube.labels)
    edges: dict[int, list[Edge]] = defaultdict(list)
    lineage: dict[int, dict[str, list[MemoryId]]] = defaultdict(lambda: defaultdict(list))
    for seq, kind, target, weight, _ in _all_relations(labelled).rows(session, asked):
        if weight is None:
            lineage[seq][kind].append(MemoryId(target))
        else:
            edges[seq].append(Edge(kind, MemoryId(target), weight))
    return (
        {seq: tuple(found) for seq, found in edges.items()},
        {
            seq: Lineage(
                derived_from=tuple(by_relation[Relation.DERIVED_FROM]),
                merged_into=next(iter(by_relation[Relation.MERGED_INTO]), None),
                supersedes=tuple(by_relation[Relation.SUPERSEDES]),
            )
            for seq, by_relation in lineage.items()
        },
    )


def load_history(
    session: Session, cube: SeenCube, memory_id: str, rows: Sequence[MemoryVersionRow]
) -> list[MemoryVersion]:
    """Those of a memory's versions that the actor may see, with lineage as far as it does.

    A label that was taken off opens what is said now, and not what was said under it.
    """
    shown = [row for row in rows if sees_labels(cube.role, cube.labels, row.labels)]
    named = {one for row in shown for ids in (row.lineage or {}).values() for one in ids}
    seen = {
        found
        for part in in_parts(named)
        for found in session.scalars(
            select(MemoryRow.id).where(MemoryRow.id.in_(part), visible(cube, by_number=True))
        )
    }
    return [_to_version(memory_id, row, seen) for row in shown]


def _to_version(memory_id: str, row: MemoryVersionRow, seen: Collection[str]) -> MemoryVersion:
    stored = row.lineage or {}
    ids = {
        relation: tuple(MemoryId(one) for one in stored.get(relation, ()) if one in seen)
        for relation in Relation
    }
    return MemoryVersion(
        memory_id=MemoryId(memory_id),
        version=row.version,
        text=row.text,
        tags=tuple(row.tags),
        labels=tuple(row.labels),
        metadata=row.attributes,
        source=source_from_json(row.source),
        state=row.state,
        expires_at=row.expires_at,
        change=row.change,
        reason=row.reason,
        changed_by=PrincipalId(row.changed_by),
        changed_at=row.changed_at,
        lineage=Lineage(
            derived_from=ids[Relation.DERIVED_FROM],
            merged_into=next(iter(ids[Relation.MERGED_INTO]), None),
            supersedes=ids[Relation.SUPERSEDES],
        ),
    )


def load_cubes(session: Session, cubes: Sequence[OpenCube], *, now: datetime) -> list[Cube]:
    """Cubes with counts of what the actor may see and the state of their activation memory."""
    counts = count_memories(session, cubes, now=now)
    states = activations(session, [cube.row for cube in cubes], now=now)
    loaded = []
    for cube in cubes:
        row = cube.row
        by_state: dict[MemoryState, int] = defaultdict(int)
        by_tier: dict[Tier, int] = defaultdict(int)
        for (state, tier), number in counts.get(row.id, {}).items():
            by_state[state] += number
            if state is MemoryState.ACTIVE:
                by_tier[tier] += number
        loaded.append(
            Cube(
                id=CubeId(row.id),
                name=row.name,
                description=row.description,
                preamble=row.preamble,
                labels=tuple(row.labels),
                owner=PrincipalId(row.owner),
                version=row.version,
                epoch=row.epoch,
                created_at=row.created_at,
                updated_at=row.updated_at,
                memories=count_states(by_state),
                tiers=count_tiers(by_tier),
                activation=states[row.id],
            )
        )
    return loaded


def count_memories(
    session: Session, cubes: Sequence[OpenCube], *, now: datetime
) -> dict[str, Counts]:
    """Visible memories of each cube by state and tier; what has expired is archived."""
    found: dict[str, dict[tuple[MemoryState, Tier], int]] = defaultdict(lambda: defaultdict(int))
    for cube_id, state, tier, count in _count(session, cubes):
        found[cube_id][state, tier] += count
    # Few, since they are archived soon, and looked up by their times: the rest is counted from
    # an index that knows none.
    for cube_id, state, tier, count in _count(session, cubes, expired(now)):
        found[cube_id][state, tier] -= count
        found[cube_id][MemoryState.ARCHIVED, tier] += count
    return {cube_id: dict(counts) for cube_id, counts in found.items()}


def _count(
    session: Session, cubes: Sequence[OpenCube], *which: ColumnElement[bool]
) -> Iterator[tuple[str, MemoryState, Tier, int]]:
    grouped = (MemoryRow.cube_id, MemoryRow.state, MemoryRow.tier)
    counts = select(*grouped, func.count()).where(*which).group_by(*grouped)
    whole = [cube.row.id for cube in cubes if cube.role is Role.OWNER]
    queries = [counts.where(MemoryRow.cube_id.in_(whole))]
    queries += [counts.where(visible(cube)) for cube in cubes if cube.role is not Role.OWNER]
    for query in queries:
        yield from session.execute(query)


def to_job(row: JobRow) -> Job:
    """A job as it stands."""
    return Job(
        id=JobId(row.id),
        cube_id=CubeId(row.cube_id),
        kind=row.kind,
        state=row.state,
        progress=row.progress,
        message=row.message,
        error=row.error,
        payload=row.payload,
        created_at=row.created_at,
        updated_at=row.updated_at,
        lease_owner=row.lease_owner,
        lease_until=row.lease_until,
        attempts=row.attempts,
        created_by=PrincipalId(row.created_by),
        proofs=tuple(_to_proof(stored) for stored in row.proofs or ()),
    )


def proof_to_json(proof: Proof) -> dict[str, Any]:
    """A proof as it is stored."""
    return {**asdict(proof), "done_at": proof.done_at.isoformat()}


def _to_proof(stored: Mapping[str, Any]) -> Proof:
    return Proof(
        what=Removed(stored["what"]),
        count=stored["count"],
        checked=stored["checked"],
        done_at=datetime.fromisoformat(stored["done_at"]),
    )
