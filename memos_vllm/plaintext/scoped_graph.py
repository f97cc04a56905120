"""The catalog as one search sees it: only what its caller may see, and one state of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

from memos_vllm.domain.access import Principal
from memos_vllm.domain.finding import Facts, Link
from memos_vllm.domain.memory import Memory
from memos_vllm.domain.scope import Scope
from memos_vllm.plaintext import packing
from memos_vllm.plaintext.embedders.base import Embedder, Vectors
from memos_vllm.plaintext.follower import IndexedCatalog


class SearchedCatalog(IndexedCatalog, Protocol):
    """The catalog as a search sees it; `memos_vllm.control.finding` says what each does."""

    def snapshot(self) -> AbstractContextManager[None]: ...
    def search_scope(self, actor: Principal, cube_ids: Sequence[str]) -> Scope: ...
    def links(
        self,
        scope: Scope,
        seqs: Sequence[int],
        *,
        fan_out: int,
        mentioning: Sequence[int] = (),
        max_mentions: int = 0,
    ) -> list[Link]: ...
    def facts(self, seqs: Sequence[int]) -> Mapping[int, Facts]: ...
    def authors(self, scope: Scope, names: Collection[str]) -> set[str]: ...
    def authored(self, scope: Scope, names: Collection[str], seqs: Collection[int]) -> set[int]: ...
    def stored_vectors(self, seqs: Sequence[int], *, embedder: str) -> Mapping[int, bytes]: ...
    def text_bytes(self, seqs: Sequence[int]) -> int: ...
    def load_found(
        self, scope: Scope, seqs: Sequence[int], *, answering: bool
    ) -> dict[int, Memory]: ...


class ScopedGraph:
    """The catalog's edges, of what one caller may see.

    Args:
        snapshot: holds the state of the catalog that edges and priors are read from. Before and
            after them another server may be asked, to embed and to rerank, for which no snapshot
            is kept open: erasing waits for it to be closed.
        embedder: what made the vectors that are compared.
    """

    def __init__(
        self, catalog: SearchedCatalog, scope: Scope, snapshot: ExitStack, *, embedder: Embedder
    ) -> None:
        self._catalog = catalog
        self._embedder = embedder
        self._scope = scope
        self._snapshot = snapshot
        self._begun = False

    def links(
        self,
        seqs: Sequence[int],
        *,
        fan_out: int,
        mentioning: Sequence[int] = (),
        max_mentions: int = 0,
    ) -> list[Link]:
        if not self._begun:
            self._snapshot.enter_context(self._catalog.snapshot())
            self._begun = True
        return self._catalog.links(
            self._scope,
            seqs,
            fan_out=fan_out,
            mentioning=mentioning,
            max_mentions=max_mentions,
        )

    def facts(self, seqs: Sequence[int]) -> Mapping[int, Facts]:
        return self._catalog.facts(seqs)

    def authors(self, names: Sequence[str]) -> set[str]:
        return self._catalog.authors(self._scope, names)

    def authored(self, names: Collection[str], seqs: Sequence[int]) -> set[int]:
        return self._catalog.authored(self._scope, names, seqs)

    def vectors(self, seqs: Sequence[int]) -> Vectors:
        stored = self._catalog.stored_vectors(seqs, embedder=self._embedder.key)
        return packing.unpacked_rows([stored.get(seq) for seq in seqs], self._embedder.dimension)

    def texts(self, seqs: Sequence[int]) -> Mapping[int, str]:
        self._snapshot.close()
        found = self._catalog.load_found(self._scope, seqs, answering=False)
        return {seq: memory.text for seq, memory in found.items()}
