"""What an index of memories does, whichever store is behind it.

An index holds, for each memory, a dense vector, a sparse vector and what filters compare; never
text. The catalog is the record: an index may be lost and is built again from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from memos_vllm.domain.filters import Filter
from memos_vllm.domain.ids import CubeId
from memos_vllm.domain.scope import FilterFields, Scope
from memos_vllm.errors import ConfigurationError

DenseVector: TypeAlias = npt.NDArray[np.float32]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True, eq=False)
class SparseVector:
    """Terms and their weights; both [n], no index twice. Without terms, n is 0."""

    indices: npt.NDArray[np.uint32]
    values: npt.NDArray[np.float32]

    @classmethod
    def empty(cls) -> SparseVector:
        """The vector of a text without terms."""
        return cls(np.empty(0, np.uint32), np.empty(0, np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class IndexPoint:
    """One memory as the index knows it.

    Args:
        seq: the memory's number in the catalog, above 0.
        version: the version of the memory that the vectors and fields were made from.
        dense: float32 [dim], of length 1.
        sparse: the weight of each term in this memory, without IDF: that is the index's part.
    """

    seq: int
    version: int
    cube_id: CubeId
    dense: DenseVector
    sparse: SparseVector
    fields: FilterFields


@dataclass(frozen=True, slots=True)
class IndexQuery:
    """What is looked for, and where. A part that is None is not asked.

    Args:
        dense: float32 [dim].
        sparse: the weight of each term in the query; the index multiplies by IDF.
        where: the caller's own filter.
    """

    scope: Scope
    dense: DenseVector | None = None
    sparse: SparseVector | None = None
    where: Filter | None = None


class Hit(NamedTuple):
    """A memory that was found. A tuple: hundreds cross between processes with every search.

    Args:
        dense: cosine of the two dense vectors, -1 to 1; None where it was not among the nearest.
        sparse: sum over shared terms of IDF * query weight * memory weight, 0 or more; None where
            it was not among the best.
    """

    seq: int
    version: int
    cube_id: CubeId
    dense: float | None = None
    sparse: float | None = None


@dataclass(frozen=True, slots=True)
class IndexedVersion:
    """Which version of a memory the index holds."""

    seq: int
    version: int
    cube_id: CubeId


class IndexReader(Protocol):
    """The reading half of an index. Thread-safe, also beside a writer.

    Every method raises Unavailable when the store is down.
    """

    def search(
        self,
        query: IndexQuery,
        *,
        dense_limit: int,
        sparse_limit: int,
    ) -> list[Hit]:
        """The nearest by dense vector and the best by terms, in one round trip.

        A memory found both ways is one hit with both scores. Hits with dense scores come first,
        nearest first, then the others, best first. IDF counts only memories that `query.scope`
        shows (expired ones too), so that no score tells of another cube.

        Raises:
            ConfigurationError: the dense vector has another dimension than the collection.
        """

    def score(self, seqs: Sequence[int], query: IndexQuery) -> list[Hit]:
        """Exact scores of those of `seqs` that are indexed and pass scope and filter, in any order.

        A part of the query that is given has a score in every hit (sparse 0 where no term is
        shared); a part that is None has none.
        """

    def versions(
        self, *, after: int = 0, limit: int = 1000, cube_id: CubeId | None = None
    ) -> list[IndexedVersion]:
        """What is indexed, by rising seq above `after`; fewer than `limit` means that was all."""

    def count(self, *, cube_id: CubeId | None = None) -> int:
        """How many memories are indexed, in one cube or in all."""


class VectorIndex(IndexReader, Protocol):
    """One collection of an index: the vectors of one embedder."""

    @property
    def opened_empty(self) -> bool:
        """Whether the collection held nothing when it was opened: new, lost, or broken.

        Then everything must be indexed again.
        """

    def upsert(self, points: Sequence[IndexPoint]) -> None:
        """Put points in, in place of those with the same seq; searchable on return.

        Raises:
            ConfigurationError: a dense vector has another dimension than the collection.
        """

    def delete(self, seqs: Sequence[int]) -> None:
        """Take points out; numbers that are not indexed are skipped."""

    def delete_cube(self, cube_id: CubeId) -> None:
        """Take every point of a cube out."""

    def flush(self) -> None:
        """Everything written so far is durable on return."""

    def optimize(self) -> None:
        """Let the store arrange itself for faster searches, where that is ours to start.

        May take seconds to minutes; searches go on meanwhile only where the store allows it.
        """

    def optimizing(self) -> bool:
        """Whether the store is doing that now, and searches of large cubes take longer."""

    def purge(self) -> bool:
        """Rewrite files without the bytes of what was deleted or replaced; takes seconds or more.

        Returns:
            False where the store does that by itself, at a time that nobody here knows.
        """

    def close(self) -> None:
        """Flush and let go of files and connections; closing twice is harmless."""


class IndexStore(Protocol):
    """Where collections live: a folder, or a server.

    Collections are named by what their vectors are made with, so that a new embedder fills a
    new one while the old one answers.
    """

    def open(self, name: str, *, dim: int) -> VectorIndex:
        """The collection `name`, made if it is not there.

        Raises:
            ConfigurationError: it holds vectors of another dimension, or the name is unusable.
            Unavailable: the store is down.
        """

    def collections(self) -> list[str]:
        """The names of all collections of ours, sorted."""

    def drop(self, name: str) -> None:
        """Remove a collection; one that is not there is skipped. It must not be open."""

    def close(self) -> None:
        """Close every collection and the store itself."""


def check_collection_name(name: str) -> str:
    """`name` itself; raises ConfigurationError unless it can name a folder and a collection."""
    if _NAME.fullmatch(name) is None:
        raise ConfigurationError(
            f"collection name {name!r} must be 1 to 128 letters, digits, '.', '_' and "
            "'-', and start with a letter or a digit"
        )
    return name
