"""What a search returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from memos_vllm.client.errors import UnexpectedReply
from memos_vllm.client.fields import Fields
from memos_vllm.client.objects import Json, MemoryInfo


@dataclass(frozen=True, slots=True)
class Hop:
    """One edge on the way to a memory: from the memory `origin`, along it or against it.

    Args:
        weight: 0 to 1.
        detail: what the edge is about, such as the name that both memories mention.
    """

    origin: str
    kind: str
    forward: bool
    weight: float
    detail: str | None

    @classmethod
    def from_json(cls, body: object) -> Hop:
        hop = Fields(body, "search hop")
        return cls(
            origin=hop.text("origin"),
            kind=hop.text("kind"),
            forward=hop.flag("forward"),
            weight=hop.number("weight"),
            detail=hop.optional_text("detail"),
        )


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A memory that was found.

    Args:
        score: 0 to 1, higher is better.
        scores: its parts: dense, sparse and graph; with `explain` every prior too.
        via: the edges that led to it; empty when it was found by itself.
    """

    memory: MemoryInfo
    score: float
    scores: Mapping[str, float]
    via: tuple[Hop, ...]

    @classmethod
    def from_json(cls, body: object) -> SearchHit:
        hit = Fields(body, "search hit")
        return cls(
            memory=MemoryInfo.from_json(hit.raw.get("memory")),
            score=hit.number("score"),
            scores=hit.numbers("scores"),
            via=hit.each("via", Hop.from_json),
        )


@dataclass(frozen=True, slots=True)
class PendingChanges:
    """What the search index had not taken in yet: changes, and memories of a first walk."""

    changes: int
    memories: int


@dataclass(frozen=True, slots=True)
class SearchResult(Sequence[SearchHit]):
    """Hits, best first; iterate over it, index it, or take its length.

    Args:
        pending: None when the index had followed every change.
    """

    hits: tuple[SearchHit, ...]
    pending: PendingChanges | None
    raw: Json = field(repr=False, compare=False)

    @overload
    def __getitem__(self, index: int) -> SearchHit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SearchHit]: ...
    def __getitem__(self, index: int | slice) -> SearchHit | Sequence[SearchHit]:
        return self.hits[index]

    def __iter__(self) -> Iterator[SearchHit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    @classmethod
    def from_json(cls, body: object) -> SearchResult:
        result = Fields(body, "search result")
        if "data" not in result.raw:
            raise UnexpectedReply("the server's search result has no field 'data'")
        pending = result.part("pending")
        return cls(
            hits=result.each("data", SearchHit.from_json),
            pending=PendingChanges(
                changes=pending.count("changes", default=0),
                memories=pending.count("memories", default=0),
            )
            if pending.raw
            else None,
            raw=result.raw,
        )
