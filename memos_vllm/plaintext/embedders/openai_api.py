"""Vectors from any server that has OpenAI's embeddings route, vLLM's own included."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from memos_vllm.errors import ConfigurationError, Conflict, InvalidRequest, TooLarge
from memos_vllm.plaintext.embedders.base import Vectors
from memos_vllm.plaintext.embedders.endpoint import (
    ModelEndpoint,
    route_url,
    split_model_and_url,
)
from memos_vllm.plaintext.embedders.prefixes import prefixes_of

# What common servers take in one request at most.
BATCH_TEXTS = 32
BATCH_CHARS = 64_000
# The least that models in use accept; servers do not tell.
MAX_TOKENS = 512
# A text that a server refuses is halved down to this: about 250 tokens of English.
_SHORTEST_PART_CHARS = 1_000

_PROBE = "dimension"


@dataclass(frozen=True, slots=True)
class _Errand:
    """What texts are embedded for: what is put in front of them, and how long it may take."""

    prefix: str
    timeout_seconds: float
    patience_seconds: float


class OpenAiEncoder:
    """A model behind an embeddings route.

    A text that is too long for the model is embedded in halves (or quarters, ...), whose vectors
    are averaged by length.

    Args:
        endpoint: the route; this encoder closes it.
        dimension: refuse a model of another one.
    Raises:
        ConfigurationError: the server knows no such model, or refuses the API key.
        Conflict: the model's vectors have another dimension than `dimension`.
        Unavailable: the server does not answer now.
    """

    max_tokens = MAX_TOKENS

    def __init__(
        self, model: str, base_url: str, endpoint: ModelEndpoint, *, dimension: int | None = None
    ) -> None:
        self._model = model
        self._endpoint = endpoint
        prefixes = prefixes_of(model)
        self._for_documents = _Errand(prefixes.document, 60.0, 10.0)
        # Somebody waits for the answer.
        self._for_query = _Errand(prefixes.query, 10.0, 2.0)
        found = self._probe()
        self.dimension = found.shape[1]
        if dimension is not None and dimension != self.dimension:
            raise Conflict(
                f"{endpoint.name} answers vectors of {self.dimension} dimensions for model "
                f"'{model}', and had answered {dimension} before"
            )
        # With the dimension: another one cannot go into the same collection.
        self.key = f"openai:{model}@{base_url}#{self.dimension}"

    @classmethod
    def of_spec(cls, spec: str, *, api_key: str | None) -> OpenAiEncoder:
        """Open "MODEL@URL" or "MODEL@URL#DIMENSION"; raises as the class does."""
        address, _, dimension = spec.partition("#")
        model, url = split_model_and_url(address, kind="embedder")
        if dimension and not (dimension.isascii() and dimension.isdigit()):
            raise ConfigurationError(f"openai:{address} is followed by #, but by no dimension")
        endpoint = ModelEndpoint(
            route_url(url, "embeddings"), what="the embeddings server", api_key=api_key
        )
        with contextlib.ExitStack() as stack:
            stack.callback(endpoint.close)
            encoder = cls(model, url, endpoint, dimension=int(dimension) if dimension else None)
            stack.pop_all()
        return encoder

    def encode_documents(self, texts: Sequence[str]) -> Vectors:
        vectors = np.empty((len(texts), self.dimension), np.float32)
        for batch in _batches(texts):
            vectors[batch] = self._embed(texts[batch], self._for_documents)
        return vectors

    def encode_query(self, text: str) -> Vectors:
        vector: Vectors = self._embed([text], self._for_query)[0]
        return vector

    def close(self) -> None:
        self._endpoint.close()

    def _embed(self, texts: Sequence[str], errand: _Errand) -> Vectors:
        try:
            vectors = self._ask(texts, errand)
        except (InvalidRequest, TooLarge):
            if len(texts) > 1:
                # Whichever text it was, the others need not suffer.
                return np.concatenate([self._embed([text], errand) for text in texts])
            if len(texts[0]) > _SHORTEST_PART_CHARS:
                return self._embed_halves(texts[0], errand)
            # A server that refuses everything must not look like one that refuses this text.
            self._probe()
            raise
        if vectors.shape[1] != self.dimension:
            raise Conflict(
                f"{self._endpoint.name} answered vectors of {vectors.shape[1]} dimensions, and had "
                f"answered {self.dimension} before: another model answers as '{self._model}'. "
                "Serve the former model again, or restart memos_vllm to embed all memories anew"
            )
        return vectors

    def _embed_halves(self, text: str, errand: _Errand) -> Vectors:
        halves = _halves(text)
        vectors = np.concatenate([self._embed([half], errand) for half in halves])
        shares = np.array([[len(half) / len(text)] for half in halves], np.float32)
        mean: Vectors = (vectors * shares).sum(axis=0, keepdims=True)
        return mean

    def _probe(self) -> Vectors:
        try:
            return self._ask([_PROBE], self._for_documents)
        except (InvalidRequest, TooLarge) as error:
            raise ConfigurationError(
                f"{error}; it refuses a single word too: check the name of the model"
            ) from error

    def _ask(self, texts: Sequence[str], errand: _Errand) -> Vectors:
        """[n, dimension] of whatever dimension the server has."""
        answer = self._endpoint.post(
            {
                "model": self._model,
                "input": [errand.prefix + text for text in texts],
                "encoding_format": "float",
            },
            timeout_seconds=errand.timeout_seconds,
            patience_seconds=errand.patience_seconds,
        )
        try:
            items = answer["data"]  # type: ignore[index]
            by_index = {item["index"]: item["embedding"] for item in items}
            rows = [by_index[place] for place in range(len(texts))]
            vectors = np.array(rows, np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise self._endpoint.malformed(
                f"not one vector for each of {len(texts)} texts"
            ) from error
        if vectors.ndim != 2 or len(items) != len(texts) or vectors.shape[1] == 0:
            raise self._endpoint.malformed(f"not one vector for each of {len(texts)} texts")
        return vectors


def _batches(texts: Sequence[str]) -> Iterator[slice]:
    start = chars = 0
    for place, text in enumerate(texts):
        if place > start and (place - start == BATCH_TEXTS or chars + len(text) > BATCH_CHARS):
            yield slice(start, place)
            start, chars = place, 0
        chars += len(text)
    yield slice(start, len(texts))


def _halves(text: str) -> list[str]:
    """Two parts, cut at the space nearest before the middle if there is one not far from it."""
    middle = len(text) // 2
    space = text.rfind(" ", middle - middle // 4, middle)
    cut = space + 1 if space > 0 else middle
    return [text[:cut], text[cut:]]
