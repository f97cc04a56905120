"""A search and what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from memos_vllm.domain.checks import check_document
from memos_vllm.domain.filters import Filter
from memos_vllm.domain.indexing import IndexBacklog
from memos_vllm.domain.memory import Memory
from memos_vllm.errors import InvalidRequest

DEFAULT_TOP_K: Final = 10
MAX_TOP_K: Final = 10_000
DEFAULT_HOPS: Final = 1
MAX_HOPS: Final = 3
# Of all memories of one answer: it is put together in memory, several times over.
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """What is looked for.

    Args:
        hops: how many edges away from a memory that matches another one may be found; 0 to 3.
    """

    text: str
    top_k: int = DEFAULT_TOP_K
    where: Filter | None = None
    hops: int = DEFAULT_HOPS


@dataclass(frozen=True, slots=True)
class Hop:
    """One edge on the way to a memory: from `origin`, along it or against it."""

    origin: str
    kind: str
    forward: bool
    weight: float
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A memory that was found.

    Args:
        score: 0 to 1, higher is better.
        scores: what each part added (dense, sparse, graph, author, priors), which sum to the
            score, and beside them the bare `cosine` and `bm25` where there was such a part.
        via: the edges that led to it, when it was not found by itself.
    """

    memory: Memory
    score: float
    scores: Mapping[str, float]
    via: tuple[Hop, ...] = ()


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Hits, best first, and what the index had not followed when it was asked."""

    hits: tuple[SearchHit, ...]
    backlog: IndexBacklog


def checked_query(query: SearchQuery) -> SearchQuery:
    """`query` itself.

    Raises:
        InvalidRequest: blank text, or top_k or hops outside their limits.
        TooLarge: more than 64 KiB of text.
    """
    check_document(query.text, param="query")
    if not 1 <= query.top_k <= MAX_TOP_K:
        raise InvalidRequest(
            f"top_k is {query.top_k} and must lie in 1..{MAX_TOP_K}", param="top_k"
        )
    if not 0 <= query.hops <= MAX_HOPS:
        raise InvalidRequest(f"hops is {query.hops} and must lie in 0..{MAX_HOPS}", param="hops")
    return query
