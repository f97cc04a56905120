"""How a match spreads over edges to the memories around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from memos_vllm.domain.finding import Link

MENTIONS: Final = "mentions"
SUPERSEDES: Final = "supersedes"
# What reaches the end of a second edge and of a third, against the first.
HOP_DECAY: Final = 0.6


@dataclass(frozen=True, slots=True)
class KindWeight:
    """What an edge of a kind passes on, walked along it and against it."""

    along: float
    against: float


# Turns next to each other answer each other, both ways. A document passes little to each of its
# many chunks. What replaced a match matters more than what the match replaced.
KIND_WEIGHTS: Final[Mapping[str, KindWeight]] = {
    "next": KindWeight(1.0, 1.0),
    "part-of": KindWeight(0.3, 0.3),
    MENTIONS: KindWeight(0.3, 0.3),
    "derived-from": KindWeight(0.8, 0.8),
    SUPERSEDES: KindWeight(0.2, 1.0),
    "merged-into": KindWeight(1.0, 0.2),
}
OTHER_KINDS: Final = KindWeight(0.7, 0.7)

Path: TypeAlias = tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class Reached:
    """The most that reached a memory, and the edges by which it came, from a seed on."""

    value: float
    path: Path


def passes_on(link: Link) -> float:
    """What share of a value goes over a link, 0 to 1."""
    kind = KIND_WEIGHTS.get(link.kind, OTHER_KINDS)
    return link.weight * (kind.along if link.forward else kind.against)


def spread(seeds: Mapping[int, float], links: Iterable[Link], *, hops: int) -> dict[int, Reached]:
    """Carry what seeds hold over at most `hops` edges; of several ways the best one counts.

    A value never returns to the seed that it came from. Among equals the way met first stays.

    Args:
        seeds: memories and what they hold, above 0.
        links: from every memory that is passed on the way, in any order.
    Returns:
        What reached each memory, seeds included where another one reached them.
    """
    outgoing: dict[int, list[Link]] = {}
    for link in links:
        outgoing.setdefault(link.origin, []).append(link)
    front = {seed: Reached(value, ()) for seed, value in seeds.items()}
    best: dict[int, Reached] = {}
    for hop in range(hops):
        arrived: dict[int, Reached] = {}
        decay = HOP_DECAY if hop else 1.0
        for place, reached in front.items():
            origin = reached.path[0].origin if reached.path else place
            for link in outgoing.get(place, ()):
                value = reached.value * passes_on(link) * decay
                known = arrived.get(link.target)
                if value <= 0 or link.target == origin:
                    continue
                if known is None or value > known.value:
                    arrived[link.target] = Reached(value, (*reached.path, link))
        for target, reached in arrived.items():
            known = best.get(target)
            if known is None or reached.value > known.value:
                best[target] = reached
        front = arrived
    return best


def superseded(links: Iterable[Link], among: Iterable[int]) -> dict[int, set[int]]:
    """Which of `among` others of them took the place of, and which those are."""
    present = set(among)
    found: dict[int, set[int]] = {}
    for link in links:
        if link.kind == SUPERSEDES and link.origin in present and link.target in present:
            new, old = (link.origin, link.target) if link.forward else (link.target, link.origin)
            found.setdefault(old, set()).add(new)
    return found
