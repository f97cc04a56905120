"""No embedder: memories are found by their words alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memos_vllm.plaintext.embedders.base import Vectors

KEY = "none"


class WordsOnly:
    """Stands where an embedder would. Its vectors say nothing, so no search asks for them."""

    key = KEY
    dimension = 1
    max_tokens = 0

    def embed(self, texts: Sequence[str]) -> Vectors:
        """[n, 1], all ones: an index wants a vector."""
        return np.ones((len(texts), 1), np.float32)

    def embed_query(self, text: str) -> Vectors:
        """[1]."""
        return np.ones(1, np.float32)

    def close(self) -> None:
        pass
