"""Which edges a search looks at: those of its best hits, and hop by hop of what they lead to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from memos_vllm.domain.finding import Link
from memos_vllm.plaintext.index.base import Hit
from memos_vllm.plaintext.ports import MemoryGraph
from memos_vllm.plaintext.ranking import Floats, Weights, best_first, match_scores
from memos_vllm.plaintext.spreading import HOP_DECAY, passes_on

# Recall at 30 was .905 with 32, .908 with 48 and 64, .910 with 100.
NUM_SEEDS: Final = 48
FAN_OUT: Final = 8
# Of what edges lead to and the index did not find, or top_k; recall was the same without a bound.
MAX_REACHED: Final = 48
# What more memories mention than that links none of them: it would link everything to everything.
MAX_MENTIONS: Final = 6
# Seeds whose mentions are followed; each costs the catalog a look at twelve postings.
MENTIONING_SEEDS: Final = 16


@dataclass(frozen=True, slots=True)
class Walk:
    """The edges around the best hits, and the memories that they lead to and no one found."""

    links: list[Link]
    reached: list[int]


def walk_from(
    hits: Mapping[int, Hit], graph: MemoryGraph, weights: Weights, *, hops: int, top_k: int
) -> Walk:
    """Ask the graph for the edges of the best hits, and from the second hop on of their ends.

    One call of `graph.links` a hop.
    """
    if hops < 1 or not hits:
        return Walk([], [])
    seqs, guess = _estimate(list(hits.values()), weights)
    front = [seqs[place] for place in best_first(guess, seqs)[:NUM_SEEDS]]
    carried = dict(zip(seqs, guess.tolist(), strict=True))
    expanded = set(front)
    reached: dict[int, float] = {}
    links: list[Link] = []
    for hop in range(hops):
        # Of the very best also by what they mention.
        mentioning = front[:MENTIONING_SEEDS] if hop == 0 else []
        newest = graph.links(
            front, fan_out=FAN_OUT, mentioning=mentioning, max_mentions=MAX_MENTIONS
        )
        links += newest
        carried = _carried(carried, newest, decay=HOP_DECAY if hop else 1.0)
        for seq, value in carried.items():
            reached[seq] = max(value, reached.get(seq, 0.0))
        front = _strongest(carried, NUM_SEEDS, apart_from=expanded)
        if not front:
            break
        expanded.update(front)
    return Walk(links, _strongest(reached, max(MAX_REACHED, top_k), apart_from=hits))


def _estimate(hits: Sequence[Hit], weights: Weights) -> tuple[list[int], Floats]:
    """Scores before those that are missing are asked for: a missing one is at most the least."""
    columns: list[Floats | None] = []
    for values in ([hit.dense for hit in hits], [hit.sparse for hit in hits]):
        known = [value for value in values if value is not None]
        least = min(known, default=0.0)
        filled = [least if value is None else value for value in values]
        columns.append(np.array(filled, np.float64) if known else None)
    guess = np.zeros(len(hits))
    for part in match_scores(columns[0], columns[1], weights):
        if part is not None:
            guess += part
    return [hit.seq for hit in hits], guess


def _carried(held: Mapping[int, float], links: Iterable[Link], *, decay: float) -> dict[int, float]:
    """The most that comes over one edge, by where it comes to."""
    carried: dict[int, float] = {}
    for link in links:
        value = held.get(link.origin, 0.0) * passes_on(link) * decay
        carried[link.target] = max(value, carried.get(link.target, 0.0))
    return carried


def _strongest(held: Mapping[int, float], most: int, *, apart_from: Collection[int]) -> list[int]:
    """The keys of the largest values above 0; of equal ones the smaller comes first."""
    others = [seq for seq, value in held.items() if value > 0 and seq not in apart_from]
    return sorted(others, key=lambda seq: (-held[seq], seq))[:most]
