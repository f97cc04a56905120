"""Which artifact goes first when the budget is short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ArtifactUsage:
    """What a policy may know about an artifact; times in seconds since the epoch.

    Attributes:
        worth: its uses, halved every half-life, as a time: that of its use, if there was one. Twice
            the uses are worth a half-life more.
    """

    key: str
    scope: str
    num_tokens: int
    size_bytes: int
    created_at: float
    worth: float


class EvictionPolicy(Protocol):
    """Orders artifacts, least valuable first."""

    def order(self, candidates: Sequence[ArtifactUsage], *, now: float) -> list[ArtifactUsage]: ...


class LeastValuableFirst:
    """The fewest uses lately first; of two that are worth the same, the larger."""

    def order(self, candidates: Sequence[ArtifactUsage], *, now: float) -> list[ArtifactUsage]:
        del now
        return sorted(candidates, key=lambda usage: (usage.worth, -usage.size_bytes))
