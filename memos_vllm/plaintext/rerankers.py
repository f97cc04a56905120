"""Cross-encoders: slower and better judges of how well a memory answers a query, by setting."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Sequence
from typing import Protocol

from memos_vllm.errors import ConfigurationError, InvalidRequest, TooLarge
from memos_vllm.plaintext.embedders.endpoint import (
    ModelEndpoint,
    route_url,
    split_model_and_url,
)
from memos_vllm.plaintext.embedders.local import local_folder, not_loaded

NO_RERANKER = "none"

# Somebody waits for the answer; a cross-encoder on a CPU takes seconds for a hundred memories.
_TIMEOUT_SECONDS = 20.0
_PATIENCE_SECONDS = 2.0
# To these, texts are cut for a server that refuses longer ones: about 400 tokens of English.
_SHORT_QUERY_CHARS = 400
_SHORT_TEXT_CHARS = 1_200
_CROSS_ENCODER_BATCH = 16


class Reranker(Protocol):
    """Judges texts against a query. Blocking, and safe to call from several threads."""

    @property
    def key(self) -> str: ...

    def score(self, query: str, texts: Sequence[str]) -> list[float]:
        """A score for each text, in their order.

        Higher is better. Scores of one call may be compared, those of two models may not: some
        answer probabilities, others any number.

        Raises:
            InvalidRequest: the model refuses the query or a text, even when cut short.
            Unavailable: the model cannot be reached now, or answers nonsense.
        """
        ...

    def close(self) -> None:
        """Let go of the model or its connections. The reranker is not used afterwards."""
        ...


def create_reranker(spec: str, *, api_key: str | None = None) -> Reranker | None:
    """Open a reranker.

    Args:
        spec: one of
            "none": search keeps its own order;
            "sentence-transformers:MODEL", a cross-encoder's folder or hub id, on the CPU;
            "openai:MODEL@URL", a server with a rerank route as of vLLM, Jina and Cohere. A URL
            that ends with /score is asked in the way of vLLM's score route.
        api_key: sent to an "openai:" server.
    Returns:
        None for "none". A server is asked for the first time when there is something to judge.
    Raises:
        ConfigurationError: the setting does not parse, a package or model is missing.
    """
    if spec == NO_RERANKER:
        return None
    kind, _, rest = spec.partition(":")
    if rest and kind == "sentence-transformers":
        return CrossEncoderReranker(rest)
    if rest and kind == "openai":
        return ServedReranker.of_spec(rest, api_key=api_key)
    raise ConfigurationError(
        f"no reranker '{spec}': give sentence-transformers:MODEL, openai:MODEL@URL or {NO_RERANKER}"
    )


class CrossEncoderReranker:
    """A cross-encoder of sentence-transformers, on the CPU: a GPU belongs to the served model.

    Longer texts are cut at the model's own limit.

    Raises:
        ConfigurationError: the package or the model is missing, or the model is another kind.
    """

    def __init__(self, name: str) -> None:
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise ConfigurationError(
                f"the reranker sentence-transformers:{name} needs a package: "
                "pip install sentence-transformers"
            ) from error
        place = local_folder(name)
        try:
            self._model = CrossEncoder(place, device="cpu")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigurationError(not_loaded("sentence-transformers", name, error)) from error
        if self._model.num_labels != 1:
            raise ConfigurationError(
                f"the model {name} sorts texts under {self._model.num_labels} labels; a reranker "
                "gives one score"
            )
        self.key = f"sentence-transformers:{place}"
        self._lock = threading.Lock()

    def score(self, query: str, texts: Sequence[str]) -> list[float]:
        if not texts:
            return []
        pairs = [(query, text) for text in texts]
        # The tokenizers of transformers change their settings while they encode.
        with self._lock:
            scores = self._model.predict(
                pairs, batch_size=_CROSS_ENCODER_BATCH, show_progress_bar=False
            )
        return [float(score) for score in scores]

    def close(self) -> None:
        """Nothing to do: the model goes with the last reference."""


class ServedReranker:
    """A model behind a rerank or score route.

    Args:
        endpoint: the route; this reranker closes it.
    """

    def __init__(self, model: str, base_url: str, endpoint: ModelEndpoint) -> None:
        self.key = f"openai:{model}@{base_url}"
        self._model = model
        self._endpoint = endpoint
        self._scores_route = endpoint.url.endswith("/score")

    @classmethod
    def of_spec(cls, spec: str, *, api_key: str | None) -> ServedReranker:
        """Open "MODEL@URL"; raises ConfigurationError."""
        model, url = split_model_and_url(spec, kind="reranker")
        endpoint = ModelEndpoint(
            route_url(url, "rerank", "score"), what="the reranker", api_key=api_key
        )
        return cls(model, url, endpoint)

    def score(self, query: str, texts: Sequence[str]) -> list[float]:
        if not texts:
            return []
        try:
            return self._ask(query, texts)
        except (InvalidRequest, TooLarge):
            short = [text[:_SHORT_TEXT_CHARS] for text in texts]
            if short == list(texts) and len(query) <= _SHORT_QUERY_CHARS:
                raise
            return self._ask(query[-_SHORT_QUERY_CHARS:], short)

    def close(self) -> None:
        self._endpoint.close()

    def _ask(self, query: str, texts: Sequence[str]) -> list[float]:
        body: dict[str, object] = {"model": self._model}
        if self._scores_route:
            body |= {"text_1": query, "text_2": list(texts)}
        else:
            body |= {"query": query, "documents": list(texts), "top_n": len(texts)}
        answer = self._endpoint.post(
            body, timeout_seconds=_TIMEOUT_SECONDS, patience_seconds=_PATIENCE_SECONDS
        )
        items_name, score_name = (
            ("data", "score") if self._scores_route else ("results", "relevance_score")
        )
        with contextlib.suppress(KeyError, TypeError, ValueError):
            items = answer[items_name]  # type: ignore[index]
            by_index = {item["index"]: float(item[score_name]) for item in items}
            scores = [by_index[place] for place in range(len(texts))]
            if len(items) == len(texts) and all(map(math.isfinite, scores)):
                return scores
        raise self._endpoint.malformed(f"not one score for each of {len(texts)} texts")
