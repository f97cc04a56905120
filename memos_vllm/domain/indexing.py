"""What passes between the catalog and whoever keeps the search index up with it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from memos_vllm.domain.ids import CubeId
from memos_vllm.domain.memory import Memory


@dataclass(frozen=True, slots=True)
class IndexProgress:
    """How far a collection has followed the catalog.

    Args:
        name: of the collection.
        embedder: key of what makes its vectors.
        applied: the outbox entry reached; whatever came later is not indexed yet.
        walked: the memory reached on the first walk through all of them, None when it is over.
    """

    name: str
    embedder: str
    dimension: int
    applied: int
    walked: int | None
    created_at: datetime

    @property
    def complete(self) -> bool:
        """Whether it holds every memory up to `applied`, and so may answer searches."""
        return self.walked is None


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """A change to follow: of one memory, or, without one, the end of a cube."""

    seq: int
    cube_id: CubeId
    memory_seq: int | None


@dataclass(frozen=True, slots=True)
class MemoryToIndex:
    """An active memory as it is now.

    Args:
        digest, vector: what is stored of an earlier embedding: the digest of the text that was
            embedded, and its 16-bit floats.
    """

    seq: int
    memory: Memory
    digest: bytes | None = None
    vector: bytes | None = None


@dataclass(frozen=True, slots=True)
class DerivedMemory:
    """What was computed from a memory's text, to be kept beside it.

    Args:
        vector: 16-bit floats, little-endian; None when the stored one still holds.
        entities: what the memory mentions, in normal form, each at most 64 characters; None when
            they are stored already.
    """

    seq: int
    cube_id: CubeId
    digest: bytes
    vector: bytes | None
    entities: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class IndexBacklog:
    """What is not indexed yet.

    Args:
        changes: entries of the outbox that are left.
        memories: memories that a first walk has still before it.
    """

    changes: int
    memories: int
