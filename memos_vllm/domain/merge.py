"""What several memories are as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from memos_vllm.domain.memory import MAX_EDGES, Edge, Memory, NewMemory, Source
from memos_vllm.errors import InvalidRequest

MERGE_KIND: Final = "merge"
MAX_PARENTS: Final = 256


def check_parents(memory_ids: Sequence[str]) -> None:
    """Raises InvalidRequest unless these can be merged: 2 to 256 memories, none twice."""
    if not 2 <= len(memory_ids) <= MAX_PARENTS:
        raise InvalidRequest(
            f"memory_ids names {len(memory_ids)} memories; a merge takes 2 to {MAX_PARENTS}",
            param="memory_ids",
        )
    if len(set(memory_ids)) < len(memory_ids):
        raise InvalidRequest("memory_ids names a memory twice", param="memory_ids")


def merged(parents: Sequence[Memory], *, text: str | None) -> NewMemory:
    """The memory that takes the place of `parents`.

    It has every tag and label of theirs, so nobody sees more of them than before; it expires with
    the first of them; and it leads wherever they led, except to one another.

    Args:
        text: what it says; their texts, one below the other, when None.
    """
    ids = {parent.id for parent in parents}
    edges: dict[tuple[str, str], Edge] = {}
    for edge in (edge for parent in parents for edge in parent.edges):
        known = edges.get((edge.kind, edge.target))
        if edge.target not in ids and (known is None or known.weight < edge.weight):
            edges[edge.kind, edge.target] = edge
    strongest = sorted(edges.values(), key=lambda edge: -edge.weight)[:MAX_EDGES]
    said_at = [parent.source.created_at or parent.created_at for parent in parents]
    return NewMemory(
        text="\n".join(parent.text for parent in parents) if text is None else text,
        tags=tuple(dict.fromkeys(tag for parent in parents for tag in parent.tags)),
        labels=tuple(dict.fromkeys(label for parent in parents for label in parent.labels)),
        source=Source(kind=MERGE_KIND, created_at=max(said_at)),
        edges=tuple(strongest),
        expires_at=min((p.expires_at for p in parents if p.expires_at is not None), default=None),
    )
