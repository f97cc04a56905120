"""Cross-encoders by setting: a server's routes, and a local model where its library is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from model_server import Answer, ModelServer, overlap, running_server
from tiny_bert import write_bert

from memos_vllm.errors import ConfigurationError, InvalidRequest, Unavailable
from memos_vllm.plaintext.rerankers import Reranker, create_reranker

QUERY = "grey cat"
TEXTS = ["a dog", "a grey cat", "a cat"]


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with running_server() as model:
        yield model


def opened(spec: str) -> Reranker:
    reranker = create_reranker(spec, api_key="sesame")
    assert reranker is not None
    return reranker


@pytest.mark.parametrize(
    ("tail", "path"), [("", "/v1/rerank"), ("/v1", "/v1/rerank"), ("/score", "/score")]
)
def test_a_server_is_asked_by_the_route_that_its_address_names(
    tail: str, path: str, server: ModelServer
) -> None:
    reranker = opened(f"openai:judge@{server.url}{tail}")
    assert reranker.score(QUERY, TEXTS) == [0.0, 1.0, 0.5]
    assert [(seen.path, seen.authorization) for seen in server.seen] == [(path, "Bearer sesame")]
    assert server.seen[0].body["model"] == "judge"
    reranker.close()


def test_nothing_to_judge_asks_nobody(server: ModelServer) -> None:
    assert opened(f"openai:judge@{server.url}").score(QUERY, []) == []
    assert server.seen == []


def test_texts_too_long_for_the_model_are_judged_by_their_openings(server: ModelServer) -> None:
    server.longest_chars = 2_000
    texts = ["grey cat " + "filler " * 1_000, "a dog"]
    scores = opened(f"openai:judge@{server.url}").score(QUERY, texts)
    assert scores == [1.0, 0.0]
    assert server.seen[-1].body["documents"] == [texts[0][:1_200], "a dog"]


def test_a_text_refused_even_when_short_is_the_callers_fault(server: ModelServer) -> None:
    server.longest_chars = 3
    with pytest.raises(InvalidRequest, match="context_length_exceeded") as caught:
        opened(f"openai:judge@{server.url}").score(QUERY, TEXTS)
    assert "dog" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        {"results": []},
        {"results": [{"index": 0, "relevance_score": 1.0}] * 3},
        {"results": [{"index": n % 3, "relevance_score": 1.0} for n in range(4)]},
        {"results": [{"index": n, "relevance_score": None} for n in range(3)]},
        {"results": [{"index": n, "relevance_score": float("nan")} for n in range(3)]},
    ],
)
def test_nonsense_is_unavailable_not_a_score(body: object, server: ModelServer) -> None:
    server.script = [Answer(body=body)]
    with pytest.raises(Unavailable):
        opened(f"openai:judge@{server.url}").score(QUERY, TEXTS)


def test_a_busy_server_is_asked_again(server: ModelServer) -> None:
    server.script = [Answer(429)]
    scores = opened(f"openai:judge@{server.url}").score(QUERY, TEXTS)
    assert scores == [overlap(QUERY, text) for text in TEXTS]


def test_a_server_without_the_route_is_a_wrong_setting(server: ModelServer) -> None:
    server.script = [Answer(404)]
    with pytest.raises(ConfigurationError, match="status 404"):
        opened(f"openai:judge@{server.url}").score(QUERY, TEXTS)


def test_none_means_no_reranker() -> None:
    assert create_reranker("none") is None


@pytest.mark.parametrize("spec", ["", "cohere", "openai:", "openai:judge", "fastembed:x"])
def test_an_unknown_setting_says_what_may_be_set(spec: str) -> None:
    with pytest.raises(ConfigurationError, match="openai:MODEL@"):
        create_reranker(spec)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigurationError, match="pip install sentence-transformers"):
        create_reranker("sentence-transformers:some/model")


def test_a_local_cross_encoder_judges_each_text_alone(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    folder = write_bert(tmp_path / "judge", num_labels=1)
    reranker = opened(f"sentence-transformers:{folder}")
    scores = reranker.score(QUERY, TEXTS)
    assert len(set(scores)) == 3
    assert reranker.score(QUERY, TEXTS[::-1]) == pytest.approx(scores[::-1], abs=1e-6)
    assert reranker.score(QUERY, []) == []


def test_a_model_with_several_labels_is_no_reranker(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    folder = write_bert(tmp_path / "classes", num_labels=3)
    with pytest.raises(ConfigurationError, match="3 labels"):
        opened(f"sentence-transformers:{folder}")
