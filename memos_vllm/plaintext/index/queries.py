"""What one search asks of a store, and how the answers become hits; the same for every store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from memos_vllm.errors import ConfigurationError
from memos_vllm.plaintext.index.base import (
    DenseVector,
    Hit,
    IndexPoint,
    IndexQuery,
    SparseVector,
)
from memos_vllm.plaintext.index.conditions import Condition, has_id, in_scope, visible

Part: TypeAlias = Literal["dense", "sparse", "filter"]

# Graphs are built within cubes, so each cube is asked by itself; beyond this many, all of them are
# scanned at once, which is exact and takes longer.
MAX_CUBES_ONE_BY_ONE = 16
# Recall at 100 of 100,000 memories: 0.995 with 100, 0.998 with 128, 1.000 with 200.
HNSW_EF = 128
# Up to this many points are scanned rather than searched by graph: exact, and about 8 ms for 32,000
# of 384 dimensions, where the graph found 67 of 100 once a filter left a fifth of a cube.
FULL_SCAN_POINTS = 32_000
# Of a graph: edges of a node, and candidates looked at while it is built.
GRAPH_EDGES = 16
EF_CONSTRUCT = 100
PAYLOAD_WANTED = ("cube", "v")


@dataclass(frozen=True, slots=True, eq=False)
class PlannedQuery:
    """One query of a batch.

    Args:
        part: which vector is compared; "filter" compares none and takes points as they come.
        corpus: the population that IDF is computed over, for "sparse".
        exact: scan everything that passes the filter.
        narrowed: the caller's own filter is in it, so a graph may fall apart into islands.
    """

    part: Part
    where: Condition
    limit: int
    dense: DenseVector | None = None
    sparse: SparseVector | None = None
    corpus: Condition | None = None
    exact: bool = False
    narrowed: bool = False

    @property
    def hnsw_ef(self) -> int:
        """How many candidates a graph search keeps."""
        return max(HNSW_EF, self.limit)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """One row of an answer; `payload` holds `PAYLOAD_WANTED`."""

    seq: int
    score: float
    payload: dict[str, Any]


def full_scan_kilobytes(dim: int) -> int:
    """`FULL_SCAN_POINTS` in KiB of float32 vectors, Qdrant's unit for it."""
    return max(1, FULL_SCAN_POINTS * dim * 4 // 1024)


def check_dimension(vector: DenseVector, dim: int, *, collection: str) -> None:
    """Raises ConfigurationError unless `vector` is one of `dim` finite numbers."""
    if vector.shape != (dim,):
        found = vector.shape[0] if vector.ndim == 1 else f"{vector.shape}"
        raise ConfigurationError(
            f"the embedder made a vector of {found} dimensions and collection '{collection}' holds "
            f"vectors of {dim}; a collection belongs to one embedder: name another one for this"
        )
    if not np.isfinite(vector).all():
        raise ConfigurationError(
            f"the embedder made a vector with numbers that are not finite for '{collection}'"
        )


def check_points(points: Iterable[IndexPoint], dim: int, *, collection: str) -> None:
    """Raises ConfigurationError when a dense vector does not fit the collection."""
    for point in points:
        assert point.seq > 0, "seq starts at 1"
        assert point.sparse.indices.shape == point.sparse.values.shape, "a weight for each term"
        check_dimension(point.dense, dim, collection=collection)


def plan_search(query: IndexQuery, *, dense_limit: int, sparse_limit: int) -> list[PlannedQuery]:
    """The batch of a search; empty when there is nothing to look for or nowhere to look."""
    planned = []
    cube_ids = query.scope.cube_ids
    if query.dense is not None and dense_limit > 0 and cube_ids:
        one_by_one = len(cube_ids) <= MAX_CUBES_ONE_BY_ONE
        groups = [(cube_id,) for cube_id in cube_ids] if one_by_one else [cube_ids]
        planned += [
            PlannedQuery(
                "dense",
                in_scope(replace(query.scope, cube_ids=group), where=query.where),
                dense_limit,
                dense=query.dense,
                exact=not one_by_one,
                narrowed=query.where is not None,
            )
            for group in groups
        ]
    if query.sparse is not None and query.sparse.indices.size and sparse_limit > 0 and cube_ids:
        planned.append(
            PlannedQuery(
                "sparse",
                in_scope(query.scope, where=query.where),
                sparse_limit,
                sparse=query.sparse,
                corpus=visible(query.scope),
            )
        )
    return planned


def plan_score(seqs: Sequence[int], query: IndexQuery) -> list[PlannedQuery]:
    """The batch that scores exactly these points: who passes, then the scores."""
    if not seqs or not query.scope.cube_ids:
        return []
    where = in_scope(query.scope, where=query.where)
    where["must"].append(has_id(seqs))
    first = PlannedQuery(
        "filter" if query.dense is None else "dense",
        where,
        len(seqs),
        dense=query.dense,
        exact=True,
    )
    if query.sparse is None or not query.sparse.indices.size:
        return [first]
    by_terms = PlannedQuery(
        "sparse", where, len(seqs), sparse=query.sparse, corpus=visible(query.scope)
    )
    return [first, by_terms]


def merged_search(
    planned: Sequence[PlannedQuery],
    answers: Sequence[Sequence[Found]],
    *,
    dense_limit: int,
) -> list[Hit]:
    """Hits of a search: by dense score, then the rest by sparse score."""
    nearest: list[Found] = []
    by_terms: list[Found] = []
    for plan, answer in zip(planned, answers, strict=True):
        (nearest if plan.part == "dense" else by_terms).extend(answer)
    sparse = {found.seq: found.score for found in by_terms}
    first = _best_first(nearest)[:dense_limit]
    hits = [_hit(found, found.score, sparse.pop(found.seq, None)) for found in first]
    # What is left in `sparse` was not among the nearest.
    rest = (found for found in _best_first(by_terms) if found.seq in sparse)
    return hits + [_hit(found, None, found.score) for found in rest]


def merged_scores(
    planned: Sequence[PlannedQuery], answers: Sequence[Sequence[Found]], *, query: IndexQuery
) -> list[Hit]:
    """Hits of exactly these points: a score for every part that was given."""
    if not planned:
        return []
    no_terms = None if query.sparse is None else 0.0
    by_terms = {found.seq: found.score for found in answers[1]} if len(answers) > 1 else {}
    return [
        _hit(
            found,
            None if query.dense is None else found.score,
            by_terms.get(found.seq, no_terms),
        )
        for found in answers[0]
    ]


def _best_first(found: Iterable[Found]) -> list[Found]:
    return sorted(found, key=lambda item: (-item.score, item.seq))


def _hit(found: Found, dense: float | None, sparse: float | None) -> Hit:
    payload = found.payload
    return Hit(found.seq, payload["v"], payload["cube"], dense, sparse)
