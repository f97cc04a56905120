"""The shared index: collections on a Qdrant server, over its REST interface."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TypeVar

from qdrant_client import QdrantClient, models

from memos_vllm.domain.ids import CubeId
from memos_vllm.errors import ConfigurationError, Unavailable
from memos_vllm.plaintext.index.base import (
    Hit,
    IndexedVersion,
    IndexPoint,
    IndexQuery,
    check_collection_name,
)
from memos_vllm.plaintext.index.conditions import Condition, in_cubes
from memos_vllm.plaintext.index.payload import PAYLOAD_INDEXES
from memos_vllm.plaintext.index.queries import (
    PAYLOAD_WANTED,
    Found,
    PlannedQuery,
    check_dimension,
    check_points,
    merged_scores,
    merged_search,
    plan_score,
    plan_search,
)
from memos_vllm.plaintext.index.server_calls import MANAGING, READING, WRITING, ServerCalls
from memos_vllm.plaintext.index.server_models import (
    CollectionShape,
    creation,
    field_schema,
    point_struct,
    query_request,
    scored_point,
    server_filter,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

# IDF over a part of the collection came with 1.19; an older server would ignore the request for it
# and count words of every tenant.
_OLDEST = (1, 19)
_BATCH = 256
# A number takes about 20 bytes as JSON and a server takes 32 MiB in one request.
_BATCH_NUMBERS = 400_000


class ServerStore:
    """An `IndexStore` on a Qdrant server.

    Args:
        url: of its REST interface.
        namespace: starts the names of our collections there; catalogs that share a server need
            different ones, since each numbers its memories from 1.
        shards, replicas: of collections that are made from now on.
        quantize: keep int8 copies of dense vectors in memory and the float32 ones on disk, for
            collections that outgrow memory; the best are compared again by the latter.
    Raises:
        ConfigurationError: the URL or the namespace is unusable. The server is first asked by
            `open`.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        namespace: str = "memos",
        shards: int = 1,
        replicas: int = 1,
        quantize: bool = False,
    ) -> None:
        self._prefix = check_collection_name(namespace) + "--"
        self._calls = ServerCalls(url, api_key=api_key)
        self._shape = CollectionShape(shards=shards, replicas=replicas, quantize=quantize)

    def open(self, name: str, *, dim: int) -> ServerIndex:
        check_collection_name(name)
        self._check_version()
        full_name = self._prefix + name
        found = self._calls.ask(lambda client, _: _described(client, full_name), MANAGING)
        if found is None:
            logger.info("memos: creating collection '%s' at %s", full_name, self._calls.address)
            self._create(full_name, dim)
            indexed: Iterable[str] = ()
        else:
            _check_shape(found, name, dim)
            indexed = found.payload_schema
        self._create_indexes(full_name, missing=PAYLOAD_INDEXES.keys() - set(indexed))
        return ServerIndex(self._calls, full_name, dim=dim)

    def collections(self) -> list[str]:
        found = self._calls.ask(lambda client, _: client.get_collections(), MANAGING)
        names = (collection.name for collection in found.collections)
        prefix = self._prefix
        return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))

    def drop(self, name: str) -> None:
        check_collection_name(name)
        self._calls.ask(
            lambda client, seconds: client.delete_collection(self._prefix + name, timeout=seconds),
            MANAGING,
        )

    def close(self) -> None:
        self._calls.close()

    def _check_version(self) -> None:
        version = self._calls.ask(lambda client, _: client.info().version, READING)
        numbers = version.split(".")[:2]
        known = all(number.isdecimal() for number in numbers)
        if not known or tuple(int(number) for number in numbers) < _OLDEST:
            raise ConfigurationError(
                f"Qdrant at {self._calls.address} is version {version}; memos_vllm needs 1.19 or "
                "newer, which can weigh words by how rare they are within a cube"
            )

    def _create(self, full_name: str, dim: int) -> None:
        def create(client: QdrantClient, seconds: int) -> None:
            # A server of several processes of ours may have made it meanwhile.
            if not client.collection_exists(full_name):
                client.create_collection(
                    full_name, **creation(self._shape, dim=dim), timeout=seconds
                )

        self._calls.ask(create, MANAGING)

    def _create_indexes(self, full_name: str, *, missing: Iterable[str]) -> None:
        for field in sorted(missing):

            def create(client: QdrantClient, seconds: int, field: str = field) -> None:
                client.create_payload_index(
                    full_name, field, field_schema(PAYLOAD_INDEXES[field]), timeout=seconds
                )

            self._calls.ask(create, MANAGING)


def _described(client: QdrantClient, full_name: str) -> models.CollectionInfo | None:
    return client.get_collection(full_name) if client.collection_exists(full_name) else None


def _check_shape(found: models.CollectionInfo, name: str, dim: int) -> None:
    dense, sparse = found.config.params.vectors, found.config.params.sparse_vectors or {}
    if not isinstance(dense, dict) or "dense" not in dense or "sparse" not in sparse:
        raise ConfigurationError(
            f"collection '{name}' on the Qdrant server is not one of ours; remove or rename it"
        )
    if dense["dense"].size != dim:
        raise ConfigurationError(
            f"collection '{name}' holds vectors of {dense['dense'].size} dimensions and the "
            f"embedder makes {dim}; name another collection for this embedder"
        )


class ServerIndex:
    """A `VectorIndex` on a server. Writes are durable there once they return."""

    def __init__(self, calls: ServerCalls, name: str, *, dim: int) -> None:
        self.name = name
        self._calls = calls
        self._dim = dim
        self._closed = False
        # A crash between creating it and filling it must not make an empty one look complete.
        self.opened_empty = self.count() == 0

    def search(
        self,
        query: IndexQuery,
        *,
        dense_limit: int,
        sparse_limit: int,
    ) -> list[Hit]:
        self._check_query(query)
        planned = plan_search(query, dense_limit=dense_limit, sparse_limit=sparse_limit)
        return merged_search(planned, self._answers(planned), dense_limit=dense_limit)

    def score(self, seqs: Sequence[int], query: IndexQuery) -> list[Hit]:
        self._check_query(query)
        planned = plan_score(seqs, query)
        return merged_scores(planned, self._answers(planned), query=query)

    def versions(
        self, *, after: int = 0, limit: int = 1000, cube_id: CubeId | None = None
    ) -> list[IndexedVersion]:
        records, _ = self._opened().ask(
            lambda client, seconds: client.scroll(
                self.name,
                scroll_filter=_of_cube(cube_id),
                limit=limit,
                offset=after + 1,
                with_payload=list(PAYLOAD_WANTED),
                with_vectors=False,
                timeout=seconds,
            ),
            READING,
        )
        return [
            IndexedVersion(int(record.id), int(payload["v"]), CubeId(payload["cube"]))
            for record in records
            if (payload := record.payload) is not None
        ]

    def count(self, *, cube_id: CubeId | None = None) -> int:
        counted = self._opened().ask(
            lambda client, seconds: client.count(
                self.name, count_filter=_of_cube(cube_id), exact=True, timeout=seconds
            ),
            MANAGING,
        )
        return counted.count

    def upsert(self, points: Sequence[IndexPoint]) -> None:
        check_points(points, self._dim, collection=self.name)
        size = max(1, min(_BATCH, _BATCH_NUMBERS // self._dim))
        for batch in _batches(points, size):
            self._put([point_struct(point) for point in batch])

    def _put(self, points: list[models.PointStruct]) -> None:
        self._opened().ask(
            lambda client, seconds: client.upsert(self.name, points, wait=True, timeout=seconds),
            WRITING,
        )

    def delete(self, seqs: Sequence[int]) -> None:
        for batch in _batches(seqs, 1000):
            self._delete(models.PointIdsList(points=list(batch)))

    def delete_cube(self, cube_id: CubeId) -> None:
        self._delete(models.FilterSelector(filter=server_filter(_cube(cube_id))))

    def _delete(self, which: models.PointsSelector) -> None:
        self._opened().ask(
            lambda client, seconds: client.delete(self.name, which, wait=True, timeout=seconds),
            WRITING,
        )

    def flush(self) -> None:
        """Nothing to do: the server has written to its log what it has acknowledged."""
        self._opened()

    def optimize(self) -> None:
        """Nothing to do: the server's optimisers start themselves."""
        self._opened()

    def optimizing(self) -> bool:
        found = self._opened().ask(
            lambda client, _seconds: client.get_collection(self.name), READING
        )
        return found.status is not models.CollectionStatus.GREEN

    def purge(self) -> bool:
        """Nothing to do: the server's optimisers rewrite a segment once enough of it is deleted."""
        self._opened()
        return False

    def close(self) -> None:
        self._closed = True

    def _opened(self) -> ServerCalls:
        if self._closed:
            raise Unavailable(f"the index '{self.name}' is closed")
        return self._calls

    def _check_query(self, query: IndexQuery) -> None:
        if query.dense is not None:
            check_dimension(query.dense, self._dim, collection=self.name)

    def _answers(self, planned: Sequence[PlannedQuery]) -> list[list[Found]]:
        if not planned:
            return []
        requests = [query_request(plan) for plan in planned]
        answers = self._opened().ask(
            lambda client, seconds: client.query_batch_points(self.name, requests, timeout=seconds),
            READING,
        )
        return [[scored_point(point) for point in answer.points] for answer in answers]


def _cube(cube_id: CubeId) -> Condition:
    return {"must": [in_cubes([cube_id])]}


def _of_cube(cube_id: CubeId | None) -> models.Filter | None:
    return None if cube_id is None else server_filter(_cube(cube_id))


def _batches(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
