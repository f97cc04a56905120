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

    def links(self, seqs: Sequence[int], *, fan_out: int, max_mentions: int) -> Sequence[Link]:
        """Edges to and from `seqs`, at most `fan_out` of each kind and direction for each.

        `max_mentions` is how many memories may share what links them; 0 asks for no mentions.
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

    def texts(self, seqs: Sequence[int]) -> Mapping[int, str]:
        """What a reranker reads."""
        ...
