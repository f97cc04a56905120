"""What a search needs from outside `plaintext/`; the index's part is `index.base.IndexReader`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from memos_vllm.domain.finding import Facts, Link


class QueryEmbedder(Protocol):
    """The part of an embedder that a search needs."""

    def embed_query(self, text: str) -> npt.NDArray[np.float32]:
        """[dim], of length 1. Raises Unavailable."""
        ...


class MemoryGraph(Protocol):
    """The catalog as a ranking sees it: only memories of one scope."""

    def links(
        self,
        seqs: Sequence[int],
        *,
        fan_out: int,
        mentioning: Sequence[int] = (),
        max_mentions: int = 0,
    ) -> Sequence[Link]:
        """Edges to and from `seqs`, at most `fan_out` of each kind and direction for each.

        Those of `mentioning` are linked by what they mention, too, where at most `max_mentions`
        memories share it.
        """
        ...

    def facts(self, seqs: Sequence[int]) -> Mapping[int, Facts]:
        """What priors are computed from."""
        ...

    def authors(self, names: Sequence[str]) -> Collection[str]:
        """Which of these names (in normal form) are part of the name of an author."""
        ...

    def authored(self, names: Collection[str], seqs: Sequence[int]) -> Collection[int]:
        """Which of `seqs` are by an author with one of these names."""
        ...

    def vectors(self, seqs: Sequence[int]) -> npt.NDArray[np.float32]:
        """[n, dim] what the index's embedder made of them, of length 1; 0 where there is none."""
        ...

    def texts(self, seqs: Sequence[int]) -> Mapping[int, str]:
        """What a reranker reads."""
        ...
