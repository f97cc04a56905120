"""How candidates become a ranking: pure functions over small arrays, one entry a candidate.

The weights were chosen on three conversations (383 questions, evidence recall at 10), each in the
middle of a plateau: half or twice as much of one moves recall by one or two hundredths. What each
part brought: dense and sparse alone .52 and .66, together .71, with the author .79, with edges .84.
With the weights chosen on two conversations and measured on the third it is .82 to .84; what the
parts are was decided on all three, so expect a little less elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]

# A query that nothing matches well does not make its best match look perfect: the best cosine and
# the best sum of terms count as at least this much (a term that one memory in fifty holds).
LEAST_BEST_COSINE: Final = 0.5
LEAST_BEST_SPARSE: Final = 4.0
RECENCY_HALF_LIFE_DAYS: Final = 30.0
USES_THAT_COUNT: Final = 32
# From here on two texts say the same in almost the same words; of 0.8 to 1 recall was the same.
NEAR_DUPLICATE_COSINE: Final = 0.9
_JUST_BEHIND: Final = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How much each part of a score counts, against the others.

    Args:
        author: of being said by whom the query names.
        graph: of being linked to a good match.
        recency, usage: priors, too small to lift what does not match.
        superseded: what share of its score a memory loses at most that another took the place of.
        duplicate: what share of its score a copy of a better hit loses.
        rerank: the reranker's share, where one is used.
    """

    dense: float = 0.65
    sparse: float = 0.35
    author: float = 0.25
    graph: float = 0.5
    recency: float = 0.02
    usage: float = 0.02
    superseded: float = 0.3
    duplicate: float = 0.5
    rerank: float = 0.7


def match_scores(
    dense: Floats | None, sparse: Floats | None, weights: Weights
) -> tuple[Floats | None, Floats | None]:
    """What cosines and sums of terms add to a score.

    Args:
        dense: [n] cosines, None when there are no vectors.
        sparse: [n] sums over shared terms, None when the query has no terms.
    Returns:
        [n] each, 0 to its weight; None stays None.
    """
    return (
        None if dense is None else weights.dense * _of_best(dense, LEAST_BEST_COSINE),
        None if sparse is None else weights.sparse * _of_best(sparse, LEAST_BEST_SPARSE),
    )


def largest_score(
    weights: Weights, *, dense: bool, sparse: bool, author: bool, graph: bool
) -> float:
    """The sum of the weights that are in play, by which scores come to lie in 0..1."""
    return (
        weights.dense * dense
        + weights.sparse * sparse
        + weights.author * author
        + weights.graph * graph
        + weights.recency
        + weights.usage
    )


def excess(scores: Floats, *, num_seeds: int) -> Floats:
    """[n] by how much each of the best `num_seeds` beats the next one; 0 for the others.

    What spreads over edges is only what a seed has ahead of the crowd, so that it does not matter
    how many seeds there are, or whether a memory just made it among them.
    """
    if len(scores) <= num_seeds:
        return scores.copy()
    next_best = np.partition(scores, -num_seeds - 1)[-num_seeds - 1]
    above: Floats = np.maximum(scores - next_best, 0.0)
    return above


def recency(age_days: Floats) -> Floats:
    """[n] 1 for what was just said, half of that 30 days later; the future counts as now."""
    halved: Floats = 0.5 ** (np.maximum(age_days, 0.0) / RECENCY_HALF_LIFE_DAYS)
    return halved


def usage(hits: Floats) -> Floats:
    """[n] 0 for what was never used, 1 from 32 uses on, by the logarithm between."""
    used: Floats = np.minimum(np.log1p(hits) / np.log1p(USES_THAT_COUNT), 1.0)
    return used


def best_first(scores: Floats, ids: Sequence[int]) -> list[int]:
    """Positions by falling score; of equal ones the smaller id comes first."""
    return [int(place) for place in np.lexsort((np.asarray(ids, np.int64), -scores))]


def superseded_penalty(
    scores: Floats, successors: Mapping[int, Collection[int]], weights: Weights
) -> Floats:
    """What memories lose that others took the place of: so much that they rank just behind.

    Args:
        successors: for positions in `scores`, the positions of what took their place.
    Returns:
        [n] 0 or less. Where the successor hardly matches, no more than `weights.superseded` of the
        score: the question may be about how it used to be.
    """
    penalty = np.zeros(len(scores))
    for place, others in successors.items():
        ahead = scores[place] - _JUST_BEHIND * max(scores[other] for other in others)
        penalty[place] = -min(max(ahead, 0.0), weights.superseded * scores[place])
    return penalty


def duplicate_penalty(scores: Floats, vectors: npt.NDArray[np.float32], weights: Weights) -> Floats:
    """What near copies of better hits lose: greedy MMR that only looks at close likeness.

    Args:
        scores: [n], best first.
        vectors: [n, dim] of length 1, or 0 where there is none.
    Returns:
        [n] 0 or less: nothing up to a cosine of 0.9 to every hit ranked better, falling to
        `weights.duplicate` of the score for a copy.
    """
    penalty = np.zeros(len(scores))
    if len(scores) < 2:
        return penalty
    # Not by BLAS: for so little, waking its threads takes longer than the work.
    likeness = np.einsum("id,jd->ij", vectors, vectors).astype(np.float64)
    share = weights.duplicate * np.clip(
        (likeness - NEAR_DUPLICATE_COSINE) / (1 - NEAR_DUPLICATE_COSINE), 0.0, 1.0
    )
    if not share[np.triu_indices(len(scores), 1)].any():
        return penalty
    left, worst = list(range(len(scores))), np.zeros(len(scores))
    while left:
        reduced = scores * (1 - worst)
        chosen = max(left, key=lambda place: (reduced[place], -place))
        left.remove(chosen)
        worst[left] = np.maximum(worst[left], share[chosen, left])
    return -scores * worst


def blend_rerank(scores: Floats, reranked: Mapping[int, float], weights: Weights) -> Floats:
    """What a reranker adds to each score, once `1 - weights.rerank` of the score is kept.

    Args:
        reranked: by position, on any scale on which higher is better; the others add nothing.
    Returns:
        [n] 0 to `weights.rerank`: the span from the worst to the best becomes that of 0 to 1.
    """
    added = np.zeros(len(scores))
    if not reranked:
        return added
    low, high = min(reranked.values()), max(reranked.values())
    for place, value in reranked.items():
        added[place] = weights.rerank * ((value - low) / (high - low) if high > low else 1.0)
    return added


def _of_best(values: Floats, least: float) -> Floats:
    best = max(float(values.max(initial=0.0)), least)
    part: Floats = np.clip(values / best, 0.0, 1.0)
    return part
