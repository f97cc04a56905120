"""Which artifact goes first when the budget is short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ArtifactUsage:
    """What a policy may know about an artifact; times in seconds since the epoch."""

    key: str
    scope: str
    num_tokens: int
    size_bytes: int
    created_at: float
    last_used_at: float


class EvictionPolicy(Protocol):
    """Orders artifacts, least valuable first."""

    def order(self, candidates: Sequence[ArtifactUsage], *, now: float) -> list[ArtifactUsage]: ...


class LeastRecentlyUsed:
    """Oldest use first; of two used at the same time, the larger."""

    def order(self, candidates: Sequence[ArtifactUsage], *, now: float) -> list[ArtifactUsage]:
        del now
        return sorted(candidates, key=lambda usage: (usage.last_used_at, -usage.size_bytes))
