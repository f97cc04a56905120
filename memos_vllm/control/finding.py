"""What a search asks of the catalog: its scope, the edges between memories, and their texts.

Statements are built once: building one takes longer than running it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Executable,
    Select,
    String,
    and_,
    bindparam,
    cast,
    func,
    literal,
    or_,
    select,
    union_all,
)
from sqlalchemy.orm import Session, aliased

from memos_vllm.control.access import OpenCube, open_cube
from memos_vllm.control.batches import in_parts
from memos_vllm.control.indexing import backlog
from memos_vllm.control.service import Service
from memos_vllm.control.tables import (
    CubeRow,
    EdgeRow,
    EntityRow,
    LineageRow,
    MemoryLabelRow,
    MemoryRow,
    MemoryUsageRow,
    Relation,
)
from memos_vllm.control.views import load_memories
from memos_vllm.domain.access import Access, Principal, Role
from memos_vllm.domain.finding import AUTHOR_PREFIX, Facts, Link, SearchScope
from memos_vllm.domain.ids import CubeId
from memos_vllm.domain.memory import Memory, MemoryState
from memos_vllm.domain.scope import Scope

MENTIONS = "mentions"
# Of one kind to one memory; more than any fan-out, since some may come from what is hidden.
MAX_INCOMING = 64
# How lineage is called among the kinds of edges.
LINEAGE_KINDS: Mapping[Relation, str] = {
    Relation.DERIVED_FROM: "derived-from",
    Relation.SUPERSEDES: "supersedes",
    Relation.MERGED_INTO: "merged-into",
}


class FindingService(Service):
    """The search's part of `Mos`: reads only."""

    def search_scope(
        self, actor: Principal, cube_ids: Sequence[str], *, index: str | None
    ) -> SearchScope:
        """What the actor may find in these cubes, and what the index has not followed of them.

        Where labels differ between cubes, only those count that the actor may see in each.

        Raises:
            NotFound: the first cube that the actor may not read.
        """
        now = self._clock()
        with self._catalog.read() as session:
            cubes = [open_cube(session, actor, cube_id, Access.READ) for cube_id in cube_ids]
            left = None if index is None else backlog(session, index, cube_ids=cube_ids)
        limited = [cube.labels for cube in cubes if cube.role is not Role.OWNER]
        return SearchScope(
            scope=Scope(
                cube_ids=tuple(CubeId(cube.row.id) for cube in cubes),
                labels=frozenset.intersection(*limited) if limited else None,
                now=now.timestamp(),
            ),
            backlog=left,
        )

    def snapshot(self) -> AbstractContextManager[None]:
        """Within it, every read of this thread sees the same state of the catalog."""
        return self._catalog.snapshot()

    def links(
        self, scope: Scope, seqs: Sequence[int], *, fan_out: int, max_mentions: int
    ) -> list[Link]:
        """Edges to and from these memories, both ends within the scope, strongest first.

        Args:
            fan_out: at most this many of each kind and direction for one memory.
            max_mentions: what more memories than this mention links none of them; 0 leaves
                mentions out.
        """
        if not seqs:
            return []
        with self._catalog.read() as session:
            found = _edges(session, seqs)
            shared = _shared(session, seqs, most=max_mentions) if max_mentions else []
            ends = {link.target for link in found}
            ends.update(seq for _, sharers in shared for seq in sharers)
            seen = _seen(session, scope, ends)
        found += _mentions(shared, seqs, seen)
        return _bounded((link for link in found if link.target in seen), fan_out)

    def facts(self, seqs: Sequence[int]) -> Mapping[int, Facts]:
        """When memories came to be, and how often they reached a model."""
        with self._catalog.read() as session:
            return {
                seq: Facts(_said_at(source) or created_at, hits or 0, last_used_at)
                for part in in_parts(seqs)
                for seq, created_at, source, hits, last_used_at in session.execute(
                    _FACTS, {"seqs": part}
                )
            }

    def authors(self, scope: Scope, names: Collection[str]) -> set[str]:
        """Which of these words, in lower case, are part of the name of an author in the scope."""
        if not names:
            return set()
        asked = list(names)
        entities = {f"entity{place}": AUTHOR_PREFIX + name for place, name in enumerate(asked)}
        statement = _which_authored(len(asked), scope.labels is not None)
        with self._catalog.read() as session:
            places = session.scalars(statement, {**entities, **_bound(scope)})
            return {asked[place] for place in places}

    def authored(self, scope: Scope, names: Collection[str], seqs: Collection[int]) -> set[int]:
        """Which of `seqs` have an author with one of these names."""
        if not names or not seqs:
            return set()
        asked = {
            "cubes": list(scope.cube_ids),
            "entities": [AUTHOR_PREFIX + name for name in names],
        }
        with self._catalog.read() as session:
            return {
                seq
                for part in in_parts(seqs)
                for seq in session.scalars(_AUTHORED, {**asked, "seqs": part})
            }

    def load_found(self, scope: Scope, seqs: Sequence[int]) -> dict[int, Memory]:
        """Those of `seqs` that are in the scope now: active, unexpired, under no other label.

        The index may lag behind the catalog; this is where a search looks at what is true.
        """
        if not seqs:
            return {}
        statement, bound = _memories_in_scope(scope.labels is not None), _bound(scope)
        found: dict[int, Memory] = {}
        with self._catalog.read() as session:
            for part in in_parts(seqs):
                by_cube: dict[str, list[MemoryRow]] = defaultdict(list)
                for row in session.scalars(statement, {"seqs": part, **bound}):
                    by_cube[row.cube_id].append(row)
                for cube_id, members in by_cube.items():
                    cube = _as_seen(session, cube_id, scope)
                    loaded = load_memories(session, cube, members)
                    found |= {row.seq: memory for row, memory in zip(members, loaded, strict=True)}
        return found


def _any(name: str) -> Any:
    return bindparam(name, expanding=True)


def _in_scope(*, labelled: bool) -> ColumnElement[bool]:
    """Condition on `MemoryRow`: what the index is asked for as well, from the record itself.

    Args:
        labelled: whether only some labels are allowed; see `_bound` for the parameters.
    """
    conditions = [
        MemoryRow.cube_id.in_(_any("cubes")),
        MemoryRow.state == MemoryState.ACTIVE,
        or_(MemoryRow.expires_at.is_(None), MemoryRow.expires_at > bindparam("now")),
    ]
    if labelled:
        foreign = (
            select(MemoryLabelRow.label)
            .where(
                MemoryLabelRow.memory_seq == MemoryRow.seq,
                MemoryLabelRow.label.not_in(_any("labels")),
            )
            .exists()
        )
        conditions.append(~foreign)
    return and_(*conditions)


def _bound(scope: Scope) -> dict[str, Any]:
    """The parameters of `_in_scope`."""
    bound: dict[str, Any] = {
        "cubes": list(scope.cube_ids),
        "now": datetime.fromtimestamp(scope.now, UTC),
    }
    if scope.labels is not None:
        bound["labels"] = sorted(scope.labels)
    return bound


_FACTS = (
    select(
        MemoryRow.seq,
        MemoryRow.created_at,
        MemoryRow.source,
        MemoryUsageRow.hits,
        MemoryUsageRow.last_used_at,
    )
    .outerjoin(MemoryUsageRow, MemoryUsageRow.memory_seq == MemoryRow.seq)
    .where(MemoryRow.seq.in_(_any("seqs")))
)

_AUTHORED = select(EntityRow.memory_seq).where(
    EntityRow.cube_id.in_(_any("cubes")),
    EntityRow.entity.in_(_any("entities")),
    EntityRow.memory_seq.in_(_any("seqs")),
)


@cache
def _memories_in_scope(labelled: bool) -> Select[Any]:
    return select(MemoryRow).where(MemoryRow.seq.in_(_any("seqs")), _in_scope(labelled=labelled))


@cache
def _seqs_in_scope(labelled: bool) -> Select[Any]:
    return select(MemoryRow.seq).where(
        MemoryRow.seq.in_(_any("seqs")), _in_scope(labelled=labelled)
    )


@cache
def _which_authored(names: int, labelled: bool) -> CompoundSelect[Any]:
    """The places of those of so many names that some author in the scope has.

    One memory of each is looked for: there may be as many as there are memories.
    """
    return union_all(
        *(
            select(literal(place)).where(
                select(EntityRow.memory_seq)
                .join(MemoryRow, MemoryRow.seq == EntityRow.memory_seq)
                .where(
                    EntityRow.cube_id.in_(_any("cubes")),
                    EntityRow.entity == bindparam(f"entity{place}"),
                    _in_scope(labelled=labelled),
                )
                .exists()
            )
            for place in range(names)
        )
    )


def _all_edges() -> CompoundSelect[Any]:
    """Edges that users and ingest made, and lineage, in both directions.

    A memory has few edges of its own, and may be the target of as many as there are memories:
    every chunk leads to its document. Of those only the strongest of each kind are taken.
    """
    seqs = _any("seqs")
    parts: list[Any] = []
    for origin, target, kind, weight in (
        (EdgeRow.memory_seq, EdgeRow.target_seq, EdgeRow.kind, EdgeRow.weight),
        (LineageRow.memory_seq, LineageRow.target_seq, LineageRow.relation, literal(1.0)),
    ):
        parts.append(select(origin, target, kind, weight, literal(1)).where(origin.in_(seqs)))
        place = func.row_number().over(
            partition_by=(target, kind), order_by=(weight.desc(), origin)
        )
        incoming = (
            select(
                target.label("origin"),
                origin.label("target"),
                kind.label("kind"),
                weight.label("weight"),
                place.label("place"),
            )
            .where(target.in_(seqs))
            .subquery()
            .c
        )
        parts.append(
            select(
                incoming.origin, incoming.target, incoming.kind, incoming.weight, literal(0)
            ).where(incoming.place <= MAX_INCOMING)
        )
    return union_all(*parts)


_EDGES = _all_edges()


def _all_mentions() -> Executable:
    """What some memories mention, each with those who share it, one more than may at most.

    So that what everyone mentions costs no more than what is rare.
    """
    own, other = aliased(EntityRow), aliased(EntityRow)
    mentioned = (
        select(own.cube_id, own.entity)
        .where(own.memory_seq.in_(_any("seqs")), ~own.entity.startswith(AUTHOR_PREFIX))
        .distinct()
        .subquery()
    )
    few = (
        select(other.memory_seq)
        .where(other.cube_id == mentioned.c.cube_id, other.entity == mentioned.c.entity)
        .limit(bindparam("most") + 1)
        .correlate(mentioned)
        .subquery()
    )
    sharers = select(func.aggregate_strings(cast(few.c.memory_seq, String), ",")).scalar_subquery()
    return select(mentioned.c.entity, sharers)


_MENTIONS = _all_mentions()


def _edges(session: Session, seqs: Sequence[int]) -> list[Link]:
    named: Mapping[Any, str] = LINEAGE_KINDS
    return [
        Link(origin, target, named.get(kind, kind), weight, bool(along))
        for origin, target, kind, weight, along in session.execute(_EDGES, {"seqs": list(seqs)})
    ]


def _shared(session: Session, seqs: Sequence[int], *, most: int) -> list[tuple[str, list[int]]]:
    """What some of `seqs` mention, and who else does, where these are 2 to `most` memories."""
    found: list[tuple[str, list[int]]] = []
    for entity, joined in session.execute(_MENTIONS, {"seqs": list(seqs), "most": most}):
        sharers = [int(number) for number in joined.split(",")]
        if 2 <= len(sharers) <= most:
            found.append((entity, sharers))
    return found


def _mentions(
    shared: Iterable[tuple[str, list[int]]], seqs: Sequence[int], seen: Collection[int]
) -> list[Link]:
    """Memories that mention something rare together with one of `seqs`, closer the rarer it is.

    Only what the caller may see counts as sharing.
    """
    origins = set(seqs)
    links = []
    for entity, sharers in shared:
        visible = [seq for seq in sharers if seq in seen]
        links += [
            Link(origin, target, MENTIONS, 1.0 / (len(visible) - 1), True, detail=entity)
            for origin in visible
            if origin in origins
            for target in visible
            if target != origin
        ]
    return links


def _seen(session: Session, scope: Scope, seqs: Collection[int]) -> set[int]:
    """Those of `seqs` that lie in the scope."""
    if not seqs:
        return set()
    statement, bound = _seqs_in_scope(scope.labels is not None), _bound(scope)
    return {
        seq
        for part in in_parts(seqs)
        for seq in session.scalars(statement, {"seqs": part, **bound})
    }


def _as_seen(session: Session, cube_id: str, scope: Scope) -> OpenCube:
    role = Role.OWNER if scope.labels is None else Role.READER
    return OpenCube(session.get_one(CubeRow, cube_id), role, scope.labels or frozenset())


def _bounded(links: Iterable[Link], fan_out: int) -> list[Link]:
    """The strongest of each kind and direction for each origin; of several by one kind to one
    target only the strongest."""
    kept: dict[tuple[int, str, bool], dict[int, Link]] = defaultdict(dict)
    for link in sorted(links, key=lambda link: (-link.weight, link.origin, link.target)):
        group = kept[link.origin, link.kind, link.forward]
        if len(group) < fan_out:
            group.setdefault(link.target, link)
    return [link for group in kept.values() for link in group.values()]


def _said_at(source: Mapping[str, str | None]) -> datetime | None:
    said_at = source.get("created_at")
    return None if said_at is None else datetime.fromisoformat(said_at)
