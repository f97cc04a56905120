"""Builds the plaintext store that the settings ask for."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import SecretStr

from memos_vllm.config import ServerSettings
from memos_vllm.plaintext.embedders.base import Embedder
from memos_vllm.plaintext.embedders.create import create_embedder
from memos_vllm.plaintext.embedders.words_only import WordsOnly
from memos_vllm.plaintext.index.base import IndexStore
from memos_vllm.plaintext.rerankers import create_reranker
from memos_vllm.plaintext.store import PlaintextStore, SearchedCatalog


def open_plaintext(settings: ServerSettings, catalog: SearchedCatalog) -> PlaintextStore:
    """A store over the catalog, not started yet; what it needs is opened in its own thread.

    Raises:
        ConfigurationError: the reranker's setting, or a package that it needs is missing.
    """
    reranker = (
        None
        if settings.reranker is None
        else create_reranker(settings.reranker, api_key=_plain(settings.reranker_api_key))
    )

    def embedder(spec: str) -> Embedder:
        # The key is for the server that is set, and not for one that was set in former days.
        known = _server_of(spec) == _server_of(settings.embedder)
        opened = create_embedder(
            spec,
            api_key=_plain(settings.embedder_api_key) if known else None,
            threads=settings.embedder_threads,
        )
        return WordsOnly() if opened is None else opened

    return PlaintextStore(
        catalog,
        store=lambda: _open_store(settings, catalog),
        embedder=lambda: embedder(settings.embedder),
        former_embedder=embedder,
        reranker=reranker,
    )


def _open_store(settings: ServerSettings, catalog: SearchedCatalog) -> IndexStore:
    if settings.qdrant_url is None:
        from memos_vllm.plaintext.index.qdrant_edge import EdgeStore

        return EdgeStore(settings.index_dir)
    from memos_vllm.plaintext.index.qdrant_server import ServerStore

    return ServerStore(
        settings.qdrant_url,
        api_key=_plain(settings.qdrant_api_key),
        namespace=settings.qdrant_namespace or f"memos-{catalog.catalog_uid()}",
        shards=settings.qdrant_shards,
        replicas=settings.qdrant_replicas,
        quantize=settings.qdrant_quantization,
    )


def _server_of(spec: str) -> str:
    """The scheme and host of an embedder that another server computes; "" for others."""
    address = urlsplit(spec.rpartition("@")[2])
    return f"{address.scheme}://{address.netloc}" if address.netloc else ""


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
