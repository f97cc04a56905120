"""What a search asks of the catalog: its scope, the edges between memories, and their texts.

Statements are built once: building one takes longer than running it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    bindparam,
    func,
    literal,
    or_,
    select,
    union_all,
)
from sqlalchemy.orm import Session, aliased

from memos_vllm.control.access import foreign_label, open_cube
from memos_vllm.control.service import Service
from memos_vllm.control.sql import Prepared, one_of, unindexed
from memos_vllm.control.tables import (
    EdgeRow,
    EntityRow,
    LineageRow,
    MemoryRow,
    MemoryUsageRow,
    VectorRow,
)
from memos_vllm.control.views import load_memories
from memos_vllm.domain.access import Access, Principal, Role
from memos_vllm.domain.finding import AUTHOR_PREFIX, Facts, Link
from memos_vllm.domain.ids import CubeId
from memos_vllm.domain.memory import Memory, MemoryState, Relation
from memos_vllm.domain.scope import Scope

MENTIONS = "mentions"
# Of one kind to one memory; more than any fan-out, since some may come from what is archived.
MAX_INCOMING = 64
# How lineage is called among the kinds of edges.
LINEAGE_KINDS: Mapping[Relation, str] = {
    Relation.DERIVED_FROM: "derived-from",
    Relation.SUPERSEDES: "supersedes",
    Relation.MERGED_INTO: "merged-into",
}


class FindingService(Service):
    """The search's part of `Mos`: reads only, but for the log of what was read under a label."""

    def search_scope(self, actor: Principal, cube_ids: Sequence[str]) -> Scope:
        """What the actor may find in these cubes.

        Where labels differ between cubes, only those count that the actor may see in each.

        Raises:
            NotFound: the first cube that the actor may not read.
        """
        now = self._clock()
        with self._catalog.read() as session:
            cubes = [open_cube(session, actor, cube_id, Access.READ) for cube_id in cube_ids]
        limited = [cube.labels for cube in cubes if cube.role is not Role.OWNER]
        return Scope(
            cube_ids=tuple(CubeId(cube.row.id) for cube in cubes),
            labels=frozenset.intersection(*limited) if limited else None,
            now=now.timestamp(),
            reader=actor.id,
        )

    def snapshot(self) -> AbstractContextManager[None]:
        """Within it, every read of this thread sees the same state of the catalog."""
        return self._catalog.snapshot()

    def links(
        self,
        scope: Scope,
        seqs: Sequence[int],
        *,
        fan_out: int,
        mentioning: Sequence[int] = (),
        max_mentions: int = 0,
    ) -> list[Link]:
        """Edges to and from these memories, both ends within the scope, strongest first.

        Args:
            fan_out: at most this many of each kind and direction for one memory.
            mentioning: those of `seqs` that are linked by what they mention, too.
            max_mentions: what more memories than this mention links none of them.
        """
        if not seqs:
            return []
        with self._catalog.read() as session:
            found = _edges(session, scope, seqs)
            shared = _shared(session, scope, mentioning, most=max_mentions) if mentioning else []
            ends = {link.target for link in found}
            ends.update(seq for _, sharers in shared for seq in sharers)
            seen = _seen(session, scope, ends)
        found += _mentions(shared, mentioning, seen)
        return _bounded((link for link in found if link.target in seen), fan_out)

    def facts(self, seqs: Sequence[int]) -> Mapping[int, Facts]:
        """When memories came to be, and how often they reached a model."""
        with self._catalog.read() as session:
            return {
                seq: Facts(_said_at(said_at) or created_at, hits or 0, last_used_at)
                for seq, created_at, said_at, hits, last_used_at in _FACTS.rows(
                    session, {"seqs": seqs}
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
            places = statement.values(session, {**entities, **_bound(scope)})
            return {asked[place] for place in places}

    def authored(self, scope: Scope, names: Collection[str], seqs: Collection[int]) -> set[int]:
        """Which of `seqs` have an author with one of these names."""
        if not names or not seqs:
            return set()
        asked = {
            "cubes": list(scope.cube_ids),
            "entities": [AUTHOR_PREFIX + name for name in names],
            "seqs": seqs,
        }
        with self._catalog.read() as session:
            return set(_AUTHORED.values(session, asked))

    def stored_vectors(self, seqs: Sequence[int], *, embedder: str) -> Mapping[int, bytes]:
        """What an embedder made of memories: 16-bit floats, where it has been there already."""
        with self._catalog.read() as session:
            return dict(_VECTORS.rows(session, {"seqs": seqs, "embedder": embedder}))

    def text_bytes(self, seqs: Sequence[int]) -> int:
        """How much text memories hold together, in UTF-8."""
        with self._catalog.read() as session:
            return int(_TEXT_BYTES.values(session, {"seqs": seqs})[0])

    def load_found(
        self, scope: Scope, seqs: Sequence[int], *, answering: bool
    ) -> dict[int, Memory]:
        """Those of `seqs` that are in the scope now: active, unexpired, under no other label.

        The index may lag behind the catalog; this is where a search looks at what is true.

        Args:
            answering: whether they are for the scope's reader, not for the ranking: then the
                audit log notes those under a label.
        """
        if not seqs:
            return {}
        statement = _memories_in_scope(scope.labels is not None)
        found: dict[int, Memory] = {}
        by_cube: dict[str, list[MemoryRow]] = defaultdict(list)
        with self._catalog.read() as session:
            for row in session.scalars(statement, {"seqs": seqs, **_bound(scope)}):
                by_cube[row.cube_id].append(row)
            for cube_id, members in by_cube.items():
                cube = _CubeInScope.of(cube_id, scope)
                loaded = load_memories(session, cube, members)
                found |= {row.seq: memory for row, memory in zip(members, loaded, strict=True)}
        if answering:
            for cube_id, members in by_cube.items():
                self._note_read(scope.reader, cube_id, [found[row.seq] for row in members])
        return found


def _in_scope(*, labelled: bool) -> ColumnElement[bool]:
    """Condition on `MemoryRow`: what the index is asked for as well, from the record itself.

    Args:
        labelled: whether only some labels are allowed; see `_bound` for the parameters.
    """
    conditions = [
        one_of(unindexed(MemoryRow.cube_id), "cubes"),
        unindexed(MemoryRow.state) == MemoryState.ACTIVE,
        or_(MemoryRow.expires_at.is_(None), MemoryRow.expires_at > bindparam("now")),
    ]
    if labelled:
        conditions.append(~foreign_label())
    return and_(*conditions)


def _bound(scope: Scope) -> dict[str, Any]:
    """The parameters of `_in_scope`."""
    bound: dict[str, Any] = {
        "cubes": list(scope.cube_ids),
        "now": datetime.fromtimestamp(scope.now, UTC),
    }
    return bound | _labels(scope)


def _labels(scope: Scope) -> dict[str, Any]:
    """The parameter of `foreign_label`, where only some labels are allowed."""
    return {} if scope.labels is None else {"labels": sorted(scope.labels)}


_FACTS = Prepared(
    select(
        MemoryRow.seq,
        MemoryRow.created_at,
        MemoryRow.source["created_at"].as_string(),
        MemoryUsageRow.hits,
        MemoryUsageRow.last_used_at,
    )
    .outerjoin(MemoryUsageRow, MemoryUsageRow.memory_seq == MemoryRow.seq)
    .where(one_of(MemoryRow.seq, "seqs"))
)

_VECTORS = Prepared(
    select(VectorRow.memory_seq, VectorRow.vector).where(
        one_of(VectorRow.memory_seq, "seqs"), VectorRow.embedder == bindparam("embedder")
    )
)

_TEXT_BYTES = Prepared(
    select(func.coalesce(func.sum(MemoryRow.text_bytes), 0)).where(one_of(MemoryRow.seq, "seqs"))
)

_AUTHORED = Prepared(
    select(EntityRow.memory_seq).where(
        one_of(EntityRow.cube_id, "cubes"),
        one_of(EntityRow.entity, "entities"),
        one_of(EntityRow.memory_seq, "seqs"),
    )
)


@cache
def _memories_in_scope(labelled: bool) -> Select[Any]:
    return select(MemoryRow).where(one_of(MemoryRow.seq, "seqs"), _in_scope(labelled=labelled))


@cache
def _seqs_in_scope(labelled: bool) -> Prepared:
    return Prepared(
        select(MemoryRow.seq).where(one_of(MemoryRow.seq, "seqs"), _in_scope(labelled=labelled))
    )


@cache
def _which_authored(names: int, labelled: bool) -> Prepared:
    """The places of those of so many names that some author in the scope has.

    One memory of each is looked for: there may be as many as there are memories.
    """
    return Prepared(
        union_all(
            *(
                select(literal(place)).where(
                    select(EntityRow.memory_seq)
                    .join(MemoryRow, MemoryRow.seq == EntityRow.memory_seq)
                    .where(
                        one_of(EntityRow.cube_id, "cubes"),
                        EntityRow.entity == bindparam(f"entity{place}"),
                        _in_scope(labelled=labelled),
                    )
                    .exists()
                )
                for place in range(names)
            )
        )
    )


@cache
def _all_edges(labelled: bool) -> Prepared:
    """Edges that users and ingest made, and lineage, in both directions.

    A memory has few edges of its own, and may be the target of as many as there are memories:
    every chunk leads to its document. Of those only the strongest of each kind are taken, and
    where only some labels are allowed, none of what is under another takes their place.
    """
    parts: list[Any] = []
    for origin, target, kind, weight in (
        (EdgeRow.memory_seq, EdgeRow.target_seq, EdgeRow.kind, EdgeRow.weight),
        (LineageRow.memory_seq, LineageRow.target_seq, LineageRow.relation, literal(1.0)),
    ):
        parts.append(select(origin, target, kind, weight, literal(1)).where(one_of(origin, "seqs")))
        place = func.row_number().over(
            partition_by=(target, kind), order_by=(weight.desc(), origin)
        )
        leading = select(
            target.label("origin"),
            origin.label("target"),
            kind.label("kind"),
            weight.label("weight"),
            place.label("place"),
        ).where(one_of(target, "seqs"))
        if labelled:
            leading = leading.join(MemoryRow, MemoryRow.seq == origin).where(~foreign_label())
        incoming = leading.subquery().c
        parts.append(
            select(
                incoming.origin, incoming.target, incoming.kind, incoming.weight, literal(0)
            ).where(incoming.place <= MAX_INCOMING)
        )
    return Prepared(union_all(*parts))


@cache
def _all_mentions(labelled: bool) -> Prepared:
    """What some memories mention, once for each memory that does, where these are few.

    What everyone mentions costs a look at one more than may be, and no more. Where only some
    labels are allowed, what is under another does not count: it would tell by what it hides.
    """
    own, other, sharer = aliased(EntityRow), aliased(EntityRow), aliased(EntityRow)
    mentioned = (
        select(own.cube_id, own.entity)
        .where(one_of(own.memory_seq, "seqs"), ~own.entity.startswith(AUTHOR_PREFIX))
        .distinct()
        .subquery()
        .c
    )
    others = select(other.memory_seq).where(
        other.cube_id == mentioned.cube_id, other.entity == mentioned.entity
    )
    sharers = select(mentioned.cube_id, mentioned.entity, sharer.memory_seq).join(
        sharer, and_(sharer.cube_id == mentioned.cube_id, sharer.entity == mentioned.entity)
    )
    if labelled:
        others = others.join(MemoryRow, MemoryRow.seq == other.memory_seq).where(~foreign_label())
        sharers = sharers.join(MemoryRow, MemoryRow.seq == sharer.memory_seq).where(
            ~foreign_label()
        )
    one_too_many = others.limit(1).offset(bindparam("most")).exists()
    return Prepared(sharers.where(~one_too_many))


def _edges(session: Session, scope: Scope, seqs: Sequence[int]) -> list[Link]:
    named: Mapping[Any, str] = LINEAGE_KINDS
    statement = _all_edges(scope.labels is not None)
    return [
        Link(origin, target, named.get(kind, kind), weight, bool(along))
        for origin, target, kind, weight, along in statement.rows(
            session, {"seqs": seqs, **_labels(scope)}
        )
    ]


def _shared(
    session: Session, scope: Scope, seqs: Sequence[int], *, most: int
) -> list[tuple[str, list[int]]]:
    """What some of `seqs` mention, and who else does, where these are 2 to `most` memories."""
    sharers: dict[tuple[str, str], list[int]] = defaultdict(list)
    statement = _all_mentions(scope.labels is not None)
    asked = {"seqs": seqs, "most": most, **_labels(scope)}
    for cube_id, entity, seq in statement.rows(session, asked):
        sharers[cube_id, entity].append(seq)
    return [(entity, found) for (_, entity), found in sharers.items() if len(found) > 1]


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
    statement = _seqs_in_scope(scope.labels is not None)
    return set(statement.values(session, {"seqs": seqs, **_bound(scope)}))


@dataclass(frozen=True, slots=True)
class _CubeInScope:
    """A cube as far as a search may look into it."""

    cube_id: str
    role: Role
    labels: frozenset[str]

    @classmethod
    def of(cls, cube_id: str, scope: Scope) -> _CubeInScope:
        role = Role.OWNER if scope.labels is None else Role.READER
        return cls(cube_id, role, scope.labels or frozenset())


def _bounded(links: Iterable[Link], fan_out: int) -> list[Link]:
    """The strongest of each kind and direction for each origin; of several by one kind to one
    target only the strongest."""
    kept: dict[tuple[int, str, bool], dict[int, Link]] = defaultdict(dict)
    for link in sorted(links, key=lambda link: (-link.weight, link.origin, link.target)):
        group = kept[link.origin, link.kind, link.forward]
        if len(group) < fan_out:
            group.setdefault(link.target, link)
    return [link for group in kept.values() for link in group.values()]


def _said_at(said_at: str | None) -> datetime | None:
    return None if said_at is None else datetime.fromisoformat(said_at)
