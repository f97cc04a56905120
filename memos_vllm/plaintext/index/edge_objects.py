"""Our plans and points as objects of Qdrant Edge."""

from __future__ import annotations

import qdrant_edge as edge

from memos_vllm.plaintext.index.base import IndexPoint, SparseVector
from memos_vllm.plaintext.index.conditions import Condition
from memos_vllm.plaintext.index.payload import PAYLOAD_INDEXES, FieldKind, payload_of
from memos_vllm.plaintext.index.queries import (
    EF_CONSTRUCT,
    GRAPH_EDGES,
    PAYLOAD_WANTED,
    Found,
    PlannedQuery,
    full_scan_kilobytes,
)


def edge_config(dim: int) -> edge.EdgeConfig:
    """A collection of named dense and sparse vectors, with graphs within large cubes only."""
    return edge.EdgeConfig(
        vectors={"dense": edge.EdgeVectorParams(size=dim, distance=edge.Distance.Cosine)},
        sparse_vectors={"sparse": edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)},
        hnsw_config=edge.HnswIndexConfig(
            m=0,
            payload_m=GRAPH_EDGES,
            ef_construct=EF_CONSTRUCT,
            full_scan_threshold=full_scan_kilobytes(dim),
        ),
        # Without it a kill -9 left points with the vectors of one version and the payload of
        # another; it costs nothing that shows (11,000 points a second either way).
        wal_enabled=True,
    )


def edge_indexes() -> list[edge.UpdateOperation]:
    """The operations that create the payload indexes."""
    return [
        edge.UpdateOperation.create_field_index(name, _index_params(kind))
        for name, kind in PAYLOAD_INDEXES.items()
    ]


def _index_params(kind: FieldKind) -> edge.KeywordIndexParams | edge.FloatIndexParams:
    if kind is FieldKind.TENANT:
        return edge.KeywordIndexParams(is_tenant=True)
    if kind is FieldKind.KEYWORD:
        return edge.KeywordIndexParams(enable_hnsw=False)
    return edge.FloatIndexParams(enable_hnsw=False)


def edge_point(point: IndexPoint) -> edge.Point:
    """A point with both vectors; an empty sparse one counts for IDF like any other."""
    vectors = {"dense": point.dense.tolist(), "sparse": _sparse(point.sparse)}
    return edge.Point(point.seq, vectors, payload_of(point))


def edge_query(planned: PlannedQuery) -> edge.QueryRequest:
    """A planned query."""
    query: edge.Query | None = None
    if planned.dense is not None:
        query = edge.Query.Nearest(planned.dense.tolist(), using="dense")
    elif planned.sparse is not None:
        query = edge.Query.Nearest(_sparse(planned.sparse), using="sparse")
    corpus = planned.corpus
    return edge.QueryRequest(
        limit=planned.limit,
        query=query,
        filter=edge_filter(planned.where),
        params=edge.SearchParams(
            exact=planned.exact,
            hnsw_ef=planned.hnsw_ef,
            acorn=edge.AcornSearchParams(enable=planned.narrowed),
            idf=None if corpus is None else edge.IdfParams(corpus=edge_filter(corpus)),
        ),
        with_payload=list(PAYLOAD_WANTED),
        with_vector=False,
    )


def found_point(point: edge.ScoredPoint) -> Found:
    """A row of an answer."""
    return Found(int(point.id), point.score, dict(point.payload or {}))


def edge_filter(where: Condition) -> edge.Filter:
    """A filter of Qdrant's JSON."""
    parts = {clause: [_condition(part) for part in where[clause]] for clause in where}
    return edge.Filter(parts.get("must"), parts.get("should"), parts.get("must_not"))


def _condition(where: Condition) -> edge.ConditionType:  # noqa: PLR0911 one per kind
    match where:
        case {"key": key, "match": {"value": value}}:
            return edge.FieldCondition(key, match=edge.MatchValue(value))
        case {"key": key, "match": {"any": values}}:
            return edge.FieldCondition(key, match=edge.MatchAny(values))
        case {"key": key, "match": {"except": values}}:
            return edge.FieldCondition(key, match=edge.MatchExcept(values))
        case {"key": key, "range": bounds}:
            return edge.FieldCondition(key, range=edge.RangeFloat(**bounds))
        case {"is_empty": {"key": key}}:
            return edge.IsEmptyCondition(key)
        case {"has_id": seqs}:
            return edge.HasIdCondition(set(seqs))
        case {"nested": {"key": key, "filter": inner}}:
            return edge.NestedCondition(key, edge_filter(inner))
        case _:
            return edge_filter(where)


def _sparse(vector: SparseVector) -> edge.SparseVector:
    return edge.SparseVector(vector.indices.tolist(), vector.values.tolist())
