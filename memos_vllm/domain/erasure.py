"""Erasures: what is to be removed, and what was looked at to know that it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from memos_vllm.domain.needles import Needle


class Removed(StrEnum):
    """What an erasure removes; the words that a job shows."""

    TEXT = "text and versions"
    REPLIES = "stored replies"
    CATALOG_FILES = "freed space of the catalog"
    ARTIFACTS = "artifact files"
    BLOCKS = "resident blocks"
    POINTS = "search index points"
    INDEX_FILES = "freed space of the search index"
    LOGS = "logs"


@dataclass(frozen=True, slots=True)
class Proof:
    """Somebody looked, and it is gone.

    Args:
        count: how many there were, of what the one who asked may see; None where nobody counted.
        checked: what was looked at, and how, for a person.
    """

    what: Removed
    count: int | None
    checked: str
    done_at: datetime


@dataclass(frozen=True, slots=True)
class ErasureOrder:
    """What an erase job has to remove beside the rows, which went with the erase itself.

    Args:
        memories: number and id of each memory.
        scopes: each cube that held one, and the epoch that it had then: what was compiled under
            it is within reach of nobody any more.
        entry: the entry of the index's outbox that says that the last of them is gone.
        counts: how many there were of what, as the one who asked may know.
        needles: what is looked for in logs; dropped once that is done.
    """

    memories: tuple[tuple[int, str], ...]
    scopes: tuple[tuple[str, int], ...]
    entry: int
    counts: Mapping[Removed, int] = field(default_factory=dict)
    needles: tuple[Needle, ...] = ()

    def joined(self, other: ErasureOrder) -> ErasureOrder:
        """Both orders as one."""
        counts = {
            what: self.counts.get(what, 0) + other.counts.get(what, 0)
            for what in {**self.counts, **other.counts}
        }
        return ErasureOrder(
            memories=(*self.memories, *other.memories),
            scopes=tuple(dict.fromkeys((*self.scopes, *other.scopes))),
            entry=max(self.entry, other.entry),
            counts=counts,
            needles=tuple(dict.fromkeys((*self.needles, *other.needles))),
        )
