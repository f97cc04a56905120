"""The route of search."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import ConfigDict, Field

from memos_vllm.api import examples, limits
from memos_vllm.api.context import CurrentCall
from memos_vllm.api.replies import MemoryReply, Reply, render
from memos_vllm.api.route import MemosRoute
from memos_vllm.api.schemas import Input, PathId
from memos_vllm.api.threads import Threads
from memos_vllm.domain.filters import parse_filter
from memos_vllm.domain.search import (
    DEFAULT_HOPS,
    DEFAULT_TOP_K,
    MAX_HOPS,
    MAX_TOP_K,
    SearchHit,
    SearchQuery,
    SearchResult,
)

router = APIRouter(route_class=MemosRoute, tags=["memories"])

# Apart from the threads of the catalog: a search may wait for the index to catch up.
_SEARCHES = Threads(8)
# What `scores` always holds; `explain` shows the rest.
_MAIN_SCORES = ("dense", "sparse", "graph")


class SearchInput(Input):
    """POST /v1/memcubes/{id}/search."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "query": "how long do refunds take?",
                    "top_k": 3,
                    "filter": {
                        "tags": ["refunds", "returns"],
                        "source": {"kind": "chunk"},
                        "created_at": {"gte": "2025-01-01T00:00:00Z"},
                        "not": {"metadata": {"draft": True}},
                    },
                    "explain": True,
                }
            ]
        }
    )

    query: str = Field(json_schema_extra=limits.TEXT)
    top_k: int = Field(
        default=DEFAULT_TOP_K, description=f"1 to {MAX_TOP_K}.", json_schema_extra=limits.TOP_K
    )
    filter: dict[str, Any] | None = Field(
        default=None,
        description=(
            "All of: tags and tier (a string, or any of a list), source.{kind, uri, title, "
            "author, locator}, created_at and updated_at ({gte, gt, lte, lt}), metadata by "
            "dotted path (a value, any of a list, or a range), and, or, not."
        ),
    )
    hops: int = Field(
        default=DEFAULT_HOPS,
        description=f"Edges to follow from what matches, 0 to {MAX_HOPS}.",
        json_schema_extra=limits.HOPS,
    )
    explain: bool = Field(
        default=False, description="Every part of every score, and the edges that led to a hit."
    )

    def to_domain(self) -> SearchQuery:
        """Raises InvalidRequest when the filter does not parse."""
        where = None if self.filter is None else parse_filter(self.filter)
        return SearchQuery(text=self.query, top_k=self.top_k, where=where, hops=self.hops)


class HopReply(Reply):
    """One edge on the way to a memory: from `origin`, along it or against it."""

    origin: str
    kind: str
    forward: bool
    weight: float
    detail: str | None


class SearchHitReply(Reply):
    memory: MemoryReply
    score: float = Field(description="0 to 1.")
    scores: dict[str, float]
    via: list[HopReply] | None = Field(
        default=None, description="The edges that led here, when it was not found by itself."
    )


class PendingReply(Reply):
    """What the index has not taken in yet."""

    changes: int
    memories: int


class SearchReply(Reply):
    object: Literal["list"] = "list"
    data: list[SearchHitReply]
    next_cursor: None = None
    pending: PendingReply | None = Field(
        default=None, description="Present when newer changes were not indexed yet."
    )


@router.post(
    "/v1/memcubes/{cube_id}/search",
    summary="Search memories",
    response_model=SearchReply,
    responses=examples.answers(examples.SEARCH, 200),
)
async def search(call: CurrentCall, cube_id: PathId, body: SearchInput) -> Response:
    """Find memories by meaning, by words and along edges; best first."""
    query = body.to_domain()

    def find() -> Response:
        found = call.api.plaintext().search(call.actor, [cube_id], query)
        return render(_reply(found, explain=body.explain))

    return await _SEARCHES.run(find)


def _reply(found: SearchResult, *, explain: bool) -> SearchReply:
    backlog = found.backlog
    return SearchReply(
        data=[_hit(hit, explain=explain) for hit in found.hits],
        pending=PendingReply.model_validate(backlog)
        if backlog.changes or backlog.memories
        else None,
    )


def _hit(hit: SearchHit, *, explain: bool) -> SearchHitReply:
    shown = {name: hit.scores.get(name, 0.0) for name in _MAIN_SCORES}
    if explain:
        shown |= hit.scores
    return SearchHitReply(
        memory=MemoryReply.model_validate(hit.memory),
        score=round(hit.score, 6),
        scores={name: round(value, 6) for name, value in shown.items()},
        via=[HopReply.model_validate(hop) for hop in hit.via] or None,
    )
