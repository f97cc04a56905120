"""A search: by meaning, by words, by author and by edges, as one ranking.

    query ─ names of authors taken out ─ embed ─┐
          └ terms ──────────────────────────────┴ index.search: the nearest and the best by words
    best of them ─ graph.links, hop by hop ─ index.score: whatever still lacks a score
    fuse, spread over edges, add author and priors ─ rerank (by setting) ─ push copies back ─ top_k

Two calls of the index, and of the catalog one a hop, one for priors, one for the vectors that are
compared, and two when the query may name an author.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from memos_vllm.domain.filters import Filter
from memos_vllm.domain.finding import Link
from memos_vllm.domain.scope import Scope
from memos_vllm.plaintext.index.base import Hit, IndexQuery, IndexReader
from memos_vllm.plaintext.names import named_in
from memos_vllm.plaintext.ports import MemoryGraph, QueryEmbedder
from memos_vllm.plaintext.ranking import (
    Floats,
    Weights,
    best_first,
    blend_rerank,
    duplicate_penalty,
    excess,
    largest_score,
    match_scores,
    recency,
    superseded_penalty,
    usage,
)
from memos_vllm.plaintext.rerankers import Reranker
from memos_vllm.plaintext.spreading import Path, Reached, spread, superseded
from memos_vllm.plaintext.terms import query_terms
from memos_vllm.plaintext.walking import NUM_SEEDS, walk_from

# Of each kind of match, or twice top_k; recall was the same with 64, at 30 .002 higher with 128.
FOUND_EACH_WAY: Final = 48
RERANKED: Final = 32
# Priors and likeness move a memory by this many places, hardly by more.
COMPARED_BEYOND: Final = 20
MAX_COMPARED: Final = 120
_SECONDS_A_DAY: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class RankedMemory:
    """A memory that was found.

    Args:
        score: 0 to 1, best first. Scores of different queries may be compared, roughly.
        components: what each part added to the score; they sum to it.
        cosine, bm25: the bare scores of the index; None where the query had no such part.
        via: the edges that led to it, from a match on, when they count for more than its own
            match; else None.
    """

    seq: int
    score: float
    components: Mapping[str, float]
    cosine: float | None = None
    bm25: float | None = None
    via: Path | None = None


@dataclass(slots=True, eq=False)
class _Pool:
    """Candidates as columns: position i is one memory in each."""

    seqs: list[int]
    dense: Floats | None
    sparse: Floats | None
    components: dict[str, Floats] = field(default_factory=dict)
    reached: dict[int, Reached] = field(default_factory=dict)

    def add(self, name: str, values: Floats | None) -> None:
        if values is not None:
            self.components[name] = self.components.get(name, 0.0) + values

    def total(self) -> Floats:
        total = np.zeros(len(self.seqs))
        for values in self.components.values():
            total += values
        return total

    def take(self, places: Sequence[int]) -> _Pool:
        return _Pool(
            [self.seqs[place] for place in places],
            None if self.dense is None else self.dense[places],
            None if self.sparse is None else self.sparse[places],
            {name: values[places] for name, values in self.components.items()},
            self.reached,
        )


class Retriever:
    """Searches one index with one embedder, over what one caller may see. Keeps no state.

    Args:
        embedder: None searches by words, authors and edges only.
    """

    def __init__(
        self,
        *,
        embedder: QueryEmbedder | None,
        index: IndexReader,
        graph: MemoryGraph,
        reranker: Reranker | None = None,
        weights: Weights | None = None,
    ) -> None:
        self._embedder = embedder
        self._index = index
        self._graph = graph
        self._reranker = reranker
        self._weights = weights or Weights()

    def search(
        self,
        query: str,
        *,
        scope: Scope,
        where: Filter | None = None,
        top_k: int = 10,
        hops: int = 1,
    ) -> list[RankedMemory]:
        """The best `top_k` memories for `query`, best first.

        Args:
            hops: how many edges away from a match a memory may stand, 0 to 3; 0 leaves edges out.
        Raises:
            Unavailable: the index, the catalog, the embedder or the reranker is down.
        """
        named = named_in(query)
        names = self._graph.authors(list(named.candidates)) if named.candidates else ()
        asked = IndexQuery(
            scope=scope,
            dense=None
            if self._embedder is None
            else self._embedder.embed_query(named.without(names) if names else query),
            sparse=query_terms(query),
            where=where,
        )
        found_each_way = max(FOUND_EACH_WAY, 2 * top_k)
        hits = {
            hit.seq: hit
            for hit in self._index.search(
                asked, dense_limit=found_each_way, sparse_limit=found_each_way
            )
        }
        walk = walk_from(hits, self._graph, self._weights, hops=hops, top_k=top_k)
        pool = self._complete(hits, walk.reached, asked)
        if not pool.seqs:
            return []
        self._rate(pool, walk.links, names, scope=scope, hops=hops, top_k=top_k)
        largest = largest_score(
            self._weights,
            dense=pool.dense is not None,
            sparse=pool.sparse is not None,
            author=bool(names),
            graph=hops > 0,
        )
        pool.components = {name: part / largest for name, part in pool.components.items()}
        pool = self._reranked(pool, query)
        if asked.dense is not None:
            pool = self._without_copies(pool, top_k=top_k)
        return [_ranked(pool, place, hits) for place in range(min(top_k, len(pool.seqs)))]

    def _complete(
        self, hits: Mapping[int, Hit], reached: Iterable[int], asked: IndexQuery
    ) -> _Pool:
        """All of them with every score; what the caller's filter hides is left out."""
        has_dense = asked.dense is not None
        has_sparse = asked.sparse is not None and asked.sparse.indices.size > 0
        complete = {
            seq: hit
            for seq, hit in hits.items()
            if (hit.dense is not None or not has_dense)
            and (hit.sparse is not None or not has_sparse)
        }
        wanted = dict.fromkeys([*hits, *reached])
        missing = [seq for seq in wanted if seq not in complete]
        if missing:
            scored = {hit.seq: hit for hit in self._index.score(missing, asked)}
            complete |= scored
        seqs = [seq for seq in wanted if seq in complete]
        return _Pool(
            seqs,
            _column([complete[seq].dense for seq in seqs]) if has_dense else None,
            _column([complete[seq].sparse for seq in seqs]) if has_sparse else None,
        )

    def _rate(
        self,
        pool: _Pool,
        links: Sequence[Link],
        names: Collection[str],
        *,
        scope: Scope,
        hops: int,
        top_k: int,
    ) -> None:
        """Add every component but the reranker's."""
        weights = self._weights
        dense, sparse = match_scores(pool.dense, pool.sparse, weights)
        pool.add("dense", dense)
        pool.add("sparse", sparse)
        ahead = excess(pool.total(), num_seeds=NUM_SEEDS)
        if hops:
            held = zip(pool.seqs, ahead.tolist(), strict=True)
            pool.reached = spread({seq: v for seq, v in held if v > 0}, links, hops=hops)
            graph = [pool.reached[seq].value if seq in pool.reached else 0.0 for seq in pool.seqs]
            pool.add("graph", weights.graph * np.array(graph))
        if names:
            by_them = self._graph.authored(names, pool.seqs)
            pool.add("author", weights.author * _flags(pool.seqs, by_them))
        self._add_priors(pool, scope, among=min(top_k + COMPARED_BEYOND, len(pool.seqs)))
        replaced = superseded(links, pool.seqs)
        if replaced:
            place_of = {seq: place for place, seq in enumerate(pool.seqs)}
            by_place = {place_of[old]: [place_of[n] for n in new] for old, new in replaced.items()}
            pool.add("superseded", superseded_penalty(pool.total(), by_place, weights))

    def _add_priors(self, pool: _Pool, scope: Scope, *, among: int) -> None:
        """Small priors for the best `among`; the others stand too far back for them to matter."""
        best = best_first(pool.total(), pool.seqs)[:among]
        facts = self._graph.facts([pool.seqs[place] for place in best])
        age_days, hits = np.full(len(pool.seqs), np.inf), np.zeros(len(pool.seqs))
        for place in best:
            known = facts.get(pool.seqs[place])
            if known is not None:
                age_days[place] = (scope.now - known.created_at.timestamp()) / _SECONDS_A_DAY
                hits[place] = known.hits
        pool.add("recency", self._weights.recency * recency(age_days))
        pool.add("usage", self._weights.usage * usage(hits))

    def _reranked(self, pool: _Pool, query: str) -> _Pool:
        """`pool` best first, the best of it by the reranker's reading when there is one."""
        pool = pool.take(best_first(pool.total(), pool.seqs))
        if self._reranker is None:
            return pool
        texts = self._graph.texts(pool.seqs[:RERANKED])
        places = [place for place, seq in enumerate(pool.seqs[:RERANKED]) if seq in texts]
        read = self._reranker.score(query, [texts[pool.seqs[place]] for place in places])
        added = blend_rerank(
            pool.total(), dict(zip(places, map(float, read), strict=True)), self._weights
        )
        kept = 1 - self._weights.rerank
        pool.components = {name: part * kept for name, part in pool.components.items()}
        pool.add("rerank", added)
        return pool.take(best_first(pool.total(), pool.seqs))

    def _without_copies(self, pool: _Pool, *, top_k: int) -> _Pool:
        """`pool` best first, near copies of better hits pushed back."""
        compared = min(top_k + COMPARED_BEYOND, MAX_COMPARED, len(pool.seqs))
        if compared < 2:
            return pool
        vectors = self._graph.vectors(pool.seqs[:compared])
        penalty = np.zeros(len(pool.seqs))
        penalty[:compared] = duplicate_penalty(pool.total()[:compared], vectors, self._weights)
        if not penalty.any():
            return pool
        pool.add("duplicate", penalty)
        return pool.take(best_first(pool.total(), pool.seqs))


def _column(values: Sequence[float | None]) -> Floats:
    return np.array([0.0 if value is None else value for value in values], np.float64)


def _flags(seqs: Sequence[int], among: Collection[int]) -> Floats:
    chosen = set(among)
    return np.array([float(seq in chosen) for seq in seqs])


def _ranked(pool: _Pool, place: int, direct: Collection[int]) -> RankedMemory:
    seq = pool.seqs[place]
    parts = {name: float(values[place]) for name, values in pool.components.items()}
    reached = pool.reached.get(seq)
    own = parts.get("dense", 0.0) + parts.get("sparse", 0.0)
    led = reached is not None and (seq not in direct or parts.get("graph", 0.0) > own)
    return RankedMemory(
        seq=seq,
        score=min(max(sum(parts.values()), 0.0), 1.0),
        components=parts,
        cosine=None if pool.dense is None else float(pool.dense[place]),
        bm25=None if pool.sparse is None else float(pool.sparse[place]),
        via=reached.path if reached is not None and led else None,
    )
