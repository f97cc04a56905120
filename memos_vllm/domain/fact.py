"""A fact that a reader found in what was said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from memos_vllm.domain.ids import MemoryId

FACT_KIND: Final = "fact"


@dataclass(frozen=True, slots=True)
class NewFact:
    """One statement that stands by itself.

    Args:
        supersedes: earlier facts that cannot be true beside it; they stay, marked.
        same_as: an earlier fact that says the same: it gets these turns as further origins, and
            no new memory is made.
    """

    text: str
    supersedes: tuple[MemoryId, ...] = ()
    same_as: MemoryId | None = None
