"""What an embedder does for search, and what the models behind one have to do for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from memos_vllm.domain.checks import check_encodable
from memos_vllm.errors import Conflict, InvalidRequest, Unavailable

Vectors: TypeAlias = npt.NDArray[np.float32]

# 1.5 MB of vectors of 384 numbers.
CACHED_QUERIES = 1024


class Embedder(Protocol):
    """Turns text into vectors. Blocking, and safe to call from several threads.

    The vectors of two embedders with the same key may be compared; no others may. A key is also a
    setting: `create_embedder(key)` opens the same embedder again.
    """

    @property
    def key(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    @property
    def max_tokens(self) -> int:
        """The most tokens of a text that the model reads at once; see each one for longer texts."""
        ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Embed documents.

        Returns:
            [n, dimension], a row for each text. A row has length 1, or 0 where the model sees
            nothing in the text.
        Raises:
            InvalidRequest: a text is blank, or the model refuses it.
            Conflict: the model answered vectors of another dimension.
            Unavailable: the model cannot be reached now.
        """
        ...

    def embed_query(self, text: str) -> Vectors:
        """Embed what is searched for: [dimension], read-only. Raises as `embed` does."""
        ...

    def close(self) -> None:
        """Let go of the model or its connections. The embedder is not used afterwards."""
        ...


class Encoder(Protocol):
    """A model as `CachedEmbedder` needs it. Safe to call from several threads."""

    @property
    def key(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    def encode_documents(self, texts: Sequence[str]) -> Vectors:
        """[n, dimension], of any length. No text is blank, and none comes twice."""
        ...

    def encode_query(self, text: str) -> Vectors:
        """[dimension], of any length."""
        ...

    def close(self) -> None: ...


class CachedEmbedder:
    """An embedder of any encoder: checks what goes in and out, and does nothing twice.

    Equal texts of one call are embedded once. The vectors of the last queries are kept, in memory
    and for this embedder only; those of documents are not: the catalog keeps them.
    """

    def __init__(self, encoder: Encoder, *, cached_queries: int = CACHED_QUERIES) -> None:
        self._encoder = encoder
        self._dimension = encoder.dimension
        self._query: Callable[[str], Vectors] = lru_cache(cached_queries)(self._embed_query)

    @property
    def key(self) -> str:
        return self._encoder.key

    @property
    def dimension(self) -> int:
        return self._dimension

    @property
    def max_tokens(self) -> int:
        return self._encoder.max_tokens

    def embed(self, texts: Sequence[str]) -> Vectors:
        rows: dict[str, int] = {}
        for text in texts:
            if text not in rows:
                _check(text, param="text")
                rows[text] = len(rows)
        if not rows:
            return np.empty((0, self._dimension), np.float32)
        vectors = self._normalised(self._encoder.encode_documents(list(rows)), len(rows))
        if len(rows) == len(texts):
            return vectors
        return vectors[[rows[text] for text in texts]]

    def embed_query(self, text: str) -> Vectors:
        return self._query(text)

    def close(self) -> None:
        self._encoder.close()

    def _embed_query(self, text: str) -> Vectors:
        _check(text, param="query")
        vector: Vectors = self._normalised(self._encoder.encode_query(text)[np.newaxis], 1)[0]
        # Everyone who asks the same gets this very array.
        vector.flags.writeable = False
        return vector

    def _normalised(self, vectors: Vectors, num_texts: int) -> Vectors:
        if vectors.ndim != 2 or vectors.shape[1] != self._dimension:
            raise Conflict(
                f"the embedder '{self.key}' answered vectors of {vectors.shape[-1]} dimensions, "
                f"and had answered {self._dimension} before: another model answers under its "
                "name. Serve the former model again, or restart memos_vllm to embed all memories "
                "with the new one"
            )
        if vectors.shape[0] != num_texts:
            raise Unavailable(
                f"the embedder '{self.key}' answered {vectors.shape[0]} vectors for "
                f"{num_texts} texts"
            )
        if not np.isfinite(vectors).all():
            raise Unavailable(
                f"the embedder '{self.key}' answered vectors with infinite or undefined numbers"
            )
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        normalised: Vectors = np.divide(
            vectors, lengths, out=np.zeros(vectors.shape, np.float32), where=lengths > 0
        )
        return normalised


def _check(text: str, *, param: str) -> None:
    check_encodable(text, param=param)
    if not text.strip():
        raise InvalidRequest(f"{param} is blank: there is nothing to embed", param=param)
