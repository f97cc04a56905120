"""What the catalog tells a search of memories and the edges between them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

AUTHOR_PREFIX: Final = "by:"
"""Opens the entities that name a memory's author, one for each word of the name."""


class Link(NamedTuple):
    """An edge as it is met from one of its ends. A tuple: every search makes hundreds.

    Args:
        origin, target: numbers of memories; the search stood at `origin`.
        weight: 0 to 1.
        forward: whether the edge leads from origin to target.
        detail: what both mention, for `mentions`.
    """

    origin: int
    target: int
    kind: str
    weight: float
    forward: bool
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What priors are computed from; `created_at` is the source's time where it gives one."""

    created_at: datetime
    hits: int
    last_used_at: datetime | None
