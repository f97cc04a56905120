"""Memories, queries and filters for tests of the index, and what an index must answer to them."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from memos_vllm.domain.filters import (
    SOURCE_FIELDS,
    AllOf,
    AnyOf,
    Bounds,
    Filter,
    HasTag,
    HasTier,
    MetadataIn,
    MetadataIs,
    Not,
    SourceIs,
    TimeIn,
    matches,
)
from memos_vllm.domain.ids import CubeId
from memos_vllm.domain.memory import Tier
from memos_vllm.domain.scope import FilterFields, Scope, allows
from memos_vllm.plaintext.index.base import (
    DenseVector,
    Hit,
    IndexedVersion,
    IndexPoint,
    IndexQuery,
    SparseVector,
)

DIM = 8
NOW = 1_700_000_000.0
LONG = "x" * 200
# Sums of float32 in another order; the same for cosines of 8 to 384 dimensions.
TOLERANCE = 1e-5

_cubes = itertools.count(1)
_seqs = itertools.count(1)


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder in memory where the machine has one: how long a disk takes to sync is not tested."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as folder:
        yield Path(folder)


def new_cube() -> CubeId:
    """A cube that no other test uses."""
    return CubeId(f"cube-{next(_cubes)}")


def new_seq() -> int:
    return next(_seqs)


def unit(*values: float, dim: int = DIM) -> DenseVector:
    """A vector of length 1 that starts with `values`."""
    vector = np.zeros(dim, np.float32)
    vector[: len(values)] = values
    return vector / np.float32(np.linalg.norm(vector) or 1.0)


def sparse(**weights: float) -> SparseVector:
    """Terms `t1`, `t2`, … with their weights."""
    indices = [int(name[1:]) for name in weights]
    return SparseVector(np.array(indices, np.uint32), np.array(list(weights.values()), np.float32))


def point(
    cube_id: CubeId,
    dense: DenseVector | None = None,
    terms: SparseVector | None = None,
    *,
    seq: int | None = None,
    version: int = 1,
    **fields: Any,
) -> IndexPoint:
    return IndexPoint(
        seq=new_seq() if seq is None else seq,
        version=version,
        cube_id=cube_id,
        dense=unit(1.0) if dense is None else dense,
        sparse=SparseVector.empty() if terms is None else terms,
        fields=FilterFields(**({"created_at": NOW, "updated_at": NOW} | fields)),
    )


def scope(*cube_ids: CubeId, labels: Iterable[str] | None = None, now: float = NOW) -> Scope:
    return Scope(cube_ids, None if labels is None else frozenset(labels), now)


@dataclass
class PlainIndex:
    """An index of a dictionary and loops: the truth that stores are compared with."""

    points: dict[int, IndexPoint] = field(default_factory=dict)

    def upsert(self, points: Sequence[IndexPoint]) -> None:
        self.points.update({point.seq: point for point in points})

    def delete(self, seqs: Sequence[int]) -> None:
        for seq in seqs:
            self.points.pop(seq, None)

    def delete_cube(self, cube_id: CubeId) -> None:
        self.delete([seq for seq, point in self.points.items() if point.cube_id == cube_id])

    def versions(self) -> list[IndexedVersion]:
        return [
            IndexedVersion(seq, self.points[seq].version, self.points[seq].cube_id)
            for seq in sorted(self.points)
        ]

    def passing(self, query: IndexQuery) -> list[IndexPoint]:
        return [
            point
            for point in self.points.values()
            if allows(query.scope, point.cube_id, point.fields)
            and (query.where is None or matches(query.where, point.fields))
        ]

    def dense_scores(self, query: IndexQuery) -> dict[int, float]:
        if query.dense is None:
            return {}
        return {p.seq: cosine(query.dense, p.dense) for p in self.passing(query)}

    def sparse_scores(self, query: IndexQuery) -> dict[int, float]:
        """Of those that share a term with the query."""
        if query.sparse is None:
            return {}
        seen = [
            point
            for point in self.points.values()
            if point.cube_id in query.scope.cube_ids
            and (query.scope.labels is None or query.scope.labels.issuperset(point.fields.labels))
        ]
        wanted = dict(zip(query.sparse.indices.tolist(), query.sparse.values.tolist(), strict=True))
        idf = {term: inverse_frequency(seen, term) for term in wanted}
        scores = {}
        for point in self.passing(query):
            weights = zip(point.sparse.indices.tolist(), point.sparse.values.tolist(), strict=True)
            shared = [idf[t] * wanted[t] * weight for t, weight in weights if t in wanted]
            if shared:
                scores[point.seq] = sum(shared)
        return scores


def cosine(one: DenseVector, other: DenseVector) -> float:
    lengths = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(one @ other) / lengths if lengths else 0.0


def inverse_frequency(population: Sequence[IndexPoint], term: int) -> float:
    """Qdrant's IDF: ln(1 + (N - n + 0.5) / (n + 0.5)), N memories of which n have the term."""
    having = sum(term in point.sparse.indices for point in population)
    return math.log(1 + (len(population) - having + 0.5) / (having + 0.5))


def scores_of(hits: Iterable[Hit], part: str) -> dict[int, float]:
    """The scores of one part, of the hits that have one."""
    return {hit.seq: getattr(hit, part) for hit in hits if getattr(hit, part) is not None}


def close(found: dict[int, float], expected: dict[int, float]) -> bool:
    return found.keys() == expected.keys() and all(
        math.isclose(found[seq], expected[seq], rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        for seq in found
    )


_WORDS = ["a", "b", "", "a b", 'q"uo.te', "é", "]", LONG, LONG + "y"]
_PATHS = ["k", "n.m", "odd key", 'x"[0]', "a.b.c"]
_NUMBERS = [0, 1, -1, 1.0, 2.5, 2**53, 2**53 + 1, 1e300, -0.0]
_TIMES = [NOW - 1.0, NOW, NOW + 1e-6, NOW + 1.0]
_words = st.sampled_from(_WORDS)
_scalars = st.one_of(_words, st.booleans(), st.sampled_from(_NUMBERS))


def _some(items: st.SearchStrategy[Any], *, at_least: int = 0) -> st.SearchStrategy[Any]:
    return st.lists(items, min_size=at_least, max_size=3).map(tuple)


fields = st.builds(
    FilterFields,
    created_at=st.sampled_from(_TIMES),
    updated_at=st.sampled_from(_TIMES),
    tier=st.sampled_from(Tier),
    tags=_some(_words).map(lambda words: tuple(dict.fromkeys(words))),
    labels=_some(st.sampled_from(["red", "blue", "green"])).map(
        lambda words: tuple(dict.fromkeys(words))
    ),
    expires_at=st.sampled_from([None, None, NOW - 1.0, NOW, NOW + 1.0]),
    source=st.dictionaries(st.sampled_from(SOURCE_FIELDS), _words, max_size=2),
    metadata=st.dictionaries(st.sampled_from(_PATHS), _some(_scalars, at_least=1), max_size=3),
)


def _bounds(values: list[Any]) -> st.SearchStrategy[Bounds]:
    ends = st.dictionaries(
        st.sampled_from(["gte", "gt", "lte", "lt"]),
        st.sampled_from(values).map(float),
        min_size=1,
        max_size=2,
    )
    return ends.map(lambda chosen: Bounds(**chosen))


_leaves: st.SearchStrategy[Filter] = st.one_of(
    st.builds(HasTag, _some(_words, at_least=1)),
    st.builds(HasTier, _some(st.sampled_from(Tier), at_least=1)),
    st.builds(SourceIs, st.sampled_from(SOURCE_FIELDS), _some(_words, at_least=1)),
    st.builds(TimeIn, st.sampled_from(["created_at", "updated_at"]), _bounds(_TIMES)),
    st.builds(MetadataIs, st.sampled_from(_PATHS), _some(_scalars, at_least=1)),
    st.builds(MetadataIn, st.sampled_from(_PATHS), _bounds(_NUMBERS)),
)
filters: st.SearchStrategy[Filter] = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.builds(AllOf, _some(inner, at_least=1)),
        st.builds(AnyOf, _some(inner, at_least=1)),
        st.builds(Not, inner),
    ),
    max_leaves=6,
)
vectors: st.SearchStrategy[DenseVector] = st.lists(
    st.integers(-3, 3), min_size=DIM, max_size=DIM
).map(lambda values: unit(*values))
term_weights: st.SearchStrategy[SparseVector] = st.dictionaries(
    st.integers(0, 6).map(lambda n: f"t{n}"), st.sampled_from([0.5, 1.0, 1.75]), max_size=4
).map(lambda weights: sparse(**weights))
scopes = st.builds(
    lambda labels, now: (labels, now),
    st.one_of(st.none(), st.frozensets(st.sampled_from(["red", "blue", "green"]), max_size=2)),
    st.sampled_from([NOW - 2.0, NOW]),
)
