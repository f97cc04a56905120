"""Our plans and points as models of qdrant-client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qdrant_client import models

from memos_vllm.plaintext.index.base import IndexPoint, SparseVector
from memos_vllm.plaintext.index.conditions import Condition
from memos_vllm.plaintext.index.payload import FieldKind, payload_of
from memos_vllm.plaintext.index.queries import (
    EF_CONSTRUCT,
    GRAPH_EDGES,
    PAYLOAD_WANTED,
    Found,
    PlannedQuery,
    full_scan_kilobytes,
)


@dataclass(frozen=True, slots=True)
class CollectionShape:
    """What the operator chose for new collections."""

    shards: int = 1
    replicas: int = 1
    quantize: bool = False


def creation(shape: CollectionShape, *, dim: int) -> dict[str, Any]:
    """Arguments of `create_collection`. Graphs are within cubes, since every search names one."""
    return {
        "vectors_config": {
            "dense": models.VectorParams(
                size=dim, distance=models.Distance.COSINE, on_disk=shape.quantize or None
            )
        },
        "sparse_vectors_config": {
            "sparse": models.SparseVectorParams(modifier=models.Modifier.IDF)
        },
        "hnsw_config": models.HnswConfigDiff(
            m=0,
            payload_m=GRAPH_EDGES,
            ef_construct=EF_CONSTRUCT,
            full_scan_threshold=full_scan_kilobytes(dim),
        ),
        "quantization_config": _INT8 if shape.quantize else None,
        "shard_number": shape.shards,
        "replication_factor": shape.replicas,
    }


_INT8 = models.ScalarQuantization(
    scalar=models.ScalarQuantizationConfig(
        type=models.ScalarType.INT8, quantile=0.99, always_ram=True
    )
)


def field_schema(kind: FieldKind) -> models.PayloadSchemaParams:
    """Parameters of a payload index."""
    if kind is FieldKind.TENANT:
        return models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=True)
    if kind is FieldKind.KEYWORD:
        return models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, enable_hnsw=False)
    return models.FloatIndexParams(type=models.FloatIndexType.FLOAT, enable_hnsw=False)


def point_struct(point: IndexPoint) -> models.PointStruct:
    """A point with both vectors; an empty sparse one counts for IDF like any other."""
    return models.PointStruct(
        id=point.seq,
        vector={"dense": point.dense.tolist(), "sparse": _sparse(point.sparse)},
        payload=payload_of(point),
    )


def query_request(planned: PlannedQuery) -> models.QueryRequest:
    """A planned query."""
    query: models.NearestQuery | None = None
    if planned.dense is not None:
        query = models.NearestQuery(nearest=planned.dense.tolist())
    elif planned.sparse is not None:
        query = models.NearestQuery(nearest=_sparse(planned.sparse))
    return models.QueryRequest(
        query=query,
        using=None if query is None else planned.part,
        filter=server_filter(planned.where),
        params=_search_params(planned),
        limit=planned.limit,
        with_payload=list(PAYLOAD_WANTED),
        with_vector=False,
    )


def _search_params(planned: PlannedQuery) -> models.SearchParams | None:
    if planned.part == "filter":
        return None
    if planned.part == "sparse":
        assert planned.corpus is not None
        corpus = models.IdfCorpusParams(corpus=server_filter(planned.corpus))
        return models.SearchParams(idf=corpus)
    return models.SearchParams(
        exact=planned.exact,
        hnsw_ef=planned.hnsw_ef,
        acorn=models.AcornSearchParams(enable=planned.narrowed),
        # Says nothing where nothing is quantised; where it is, scores are of float32 vectors.
        quantization=models.QuantizationSearchParams(
            ignore=planned.exact, rescore=True, oversampling=2.0
        ),
    )


def scored_point(point: models.ScoredPoint) -> Found:
    """A row of an answer."""
    return Found(int(point.id), point.score, point.payload or {})


def server_filter(where: Condition) -> models.Filter:
    """A filter of Qdrant's JSON."""
    return models.Filter.model_validate(where)


def _sparse(vector: SparseVector) -> models.SparseVector:
    return models.SparseVector(indices=vector.indices.tolist(), values=vector.values.tolist())
