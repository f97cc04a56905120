"""Vectors from a server with OpenAI's embeddings route: order, batches, retries, refusals."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest
from model_server import DIMENSION, Answer, ModelServer, Pauses, running_server, vector_of

from memos_vllm.errors import (
    ConfigurationError,
    Conflict,
    InvalidRequest,
    TooLarge,
    Unavailable,
)
from memos_vllm.plaintext.embedders import CachedEmbedder, Embedder, create_embedder
from memos_vllm.plaintext.embedders.endpoint import ModelEndpoint
from memos_vllm.plaintext.embedders.openai_api import OpenAiEncoder


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with running_server() as model:
        yield model


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def embedder(server: ModelServer, pauses: Pauses) -> Iterator[Embedder]:
    """An embedder of the server that waits without taking time; its probe is forgotten."""
    endpoint = ModelEndpoint(
        f"{server.url}/v1/embeddings",
        what="the embeddings server",
        api_key="sesame",
        sleep=pauses.sleep,
        clock=pauses.clock,
        chance=lambda: 1.0,
    )
    opened = CachedEmbedder(OpenAiEncoder("tiny", server.url, endpoint))
    server.seen.clear()
    yield opened
    opened.close()


def unit(text: str, dimension: int = DIMENSION) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    vector = np.array(vector_of(text, dimension), np.float32)
    return vector / np.float32(np.linalg.norm(vector))


def test_the_setting_opens_the_model_and_its_key_opens_it_again(server: ModelServer) -> None:
    opened = create_embedder(f"openai:tiny@{server.url}", api_key="sesame")
    assert opened is not None
    assert opened.key == f"openai:tiny@{server.url}#{DIMENSION}"
    assert opened.dimension == DIMENSION
    np.testing.assert_allclose(opened.embed_query("hello"), unit("hello"), atol=1e-6)
    again = create_embedder(opened.key)
    assert again is not None
    assert again.key == opened.key
    assert {seen.path for seen in server.seen} == {"/v1/embeddings"}
    assert [seen.authorization for seen in server.seen] == ["Bearer sesame"] * 2 + [None]
    opened.close()
    again.close()


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/", "/v1/embeddings"])
def test_the_address_may_end_anywhere_on_the_way_to_the_route(
    tail: str, server: ModelServer
) -> None:
    opened = create_embedder(f"openai:tiny@{server.url}{tail}")
    assert opened is not None
    opened.close()
    assert server.seen[0].path == "/v1/embeddings"


def test_vectors_come_back_in_the_order_of_the_texts_whatever_the_order_of_the_answer(
    embedder: Embedder, server: ModelServer
) -> None:
    texts = [f"text {number}" for number in range(70)]
    vectors = embedder.embed(texts)
    np.testing.assert_allclose(vectors, [unit(text) for text in texts], atol=1e-6)
    assert [len(batch) for batch in server.inputs] == [32, 32, 6]


def test_long_texts_go_in_smaller_requests(embedder: Embedder, server: ModelServer) -> None:
    embedder.embed([f"{number} " + "word " * 8_000 for number in range(3)])
    assert [len(batch) for batch in server.inputs] == [1, 1, 1]


def test_a_model_that_wants_prefixes_gets_them(server: ModelServer) -> None:
    opened = create_embedder(f"openai:intfloat/e5-small-v2@{server.url}")
    assert opened is not None
    opened.embed(["a memory"])
    opened.embed_query("a question")
    opened.close()
    assert server.inputs[1:] == [["passage: a memory"], ["query: a question"]]


def test_another_dimension_is_refused_and_both_are_named(
    embedder: Embedder, server: ModelServer
) -> None:
    server.dimension = 12
    with pytest.raises(Conflict, match=r"12 dimensions.* 8 before"):
        embedder.embed(["a memory"])
    with pytest.raises(Conflict, match=r"12 dimensions.* 8 before"):
        embedder.embed_query("a question")
    server.dimension = DIMENSION
    embedder.embed_query("a question")


def test_a_key_of_another_dimension_does_not_open(server: ModelServer) -> None:
    with pytest.raises(Conflict, match=r"8 dimensions .* 384 before"):
        create_embedder(f"openai:tiny@{server.url}#384")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_refusal_is_tried_again(
    status: int, embedder: Embedder, server: ModelServer, pauses: Pauses
) -> None:
    server.script = [Answer(status), Answer(status)]
    np.testing.assert_allclose(embedder.embed(["a memory"])[0], unit("a memory"), atol=1e-6)
    assert pauses.slept == [0.25, 0.5]


def test_retry_after_is_heeded(embedder: Embedder, server: ModelServer, pauses: Pauses) -> None:
    server.script = [Answer(429, headers={"Retry-After": "3"})]
    embedder.embed(["a memory"])
    assert pauses.slept == [3.0]


def test_a_server_that_stays_busy_is_unavailable_and_says_until_when(
    embedder: Embedder, server: ModelServer, pauses: Pauses
) -> None:
    server.script = [Answer(429, headers={"Retry-After": "60"})]
    with pytest.raises(Unavailable, match="status 429") as caught:
        embedder.embed(["a memory"])
    assert caught.value.retry_after_seconds == 60
    assert pauses.slept == []


def test_a_query_gives_up_sooner_than_documents(
    embedder: Embedder, server: ModelServer, pauses: Pauses
) -> None:
    server.script = [Answer(503)] * 20
    with pytest.raises(Unavailable, match="status 503"):
        embedder.embed_query("a question")
    for_query = pauses.now
    with pytest.raises(Unavailable, match="status 503"):
        embedder.embed(["a memory"])
    assert for_query <= 2.0 < pauses.now - for_query <= 10.0


def test_a_dead_server_is_unavailable(pauses: Pauses) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    endpoint = ModelEndpoint(
        url, what="the embeddings server", sleep=pauses.sleep, clock=pauses.clock
    )
    with pytest.raises(Unavailable, match=r"cannot be reached .*is it running"):
        OpenAiEncoder("tiny", url, endpoint)
    endpoint.close()


def test_a_silent_server_is_unavailable(server: ModelServer) -> None:
    endpoint = ModelEndpoint(f"{server.url}/v1/embeddings", what="the embeddings server")
    server.script = [Answer(delay_seconds=0.4)]
    with pytest.raises(Unavailable, match=r"did not answer within 0\.05 s"):
        endpoint.post({"input": []}, timeout_seconds=0.05, patience_seconds=0.0)
    endpoint.close()


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "check the API key"), (403, "check the API key"), (404, "the name of the model")],
)
def test_a_wrong_setting_says_which(status: int, says: str, server: ModelServer) -> None:
    server.script = [Answer(status)]
    with pytest.raises(ConfigurationError, match=f"status {status}.*{says}"):
        create_embedder(f"openai:tiny@{server.url}", api_key="sesame")


def test_a_text_too_long_for_the_model_is_the_mean_of_its_parts(
    embedder: Embedder, server: ModelServer
) -> None:
    server.longest_chars = 1_500
    # Halved at its only space, not in the middle.
    text = "b" * 800 + " " + "c" * 1_199
    vectors = embedder.embed(["short", text])
    np.testing.assert_allclose(vectors[0], unit("short"), atol=1e-6)
    parts = [batch[0] for batch in server.inputs if len(batch) == 1 and len(batch[0]) <= 1_500]
    assert "".join(parts[1:]) == text
    mean = sum(len(part) * np.array(vector_of(part, DIMENSION)) for part in parts[1:])
    np.testing.assert_allclose(vectors[1], mean / np.linalg.norm(mean), atol=1e-6)


def test_a_text_that_is_refused_at_any_length_does_not_look_like_a_wrong_setting(
    embedder: Embedder, server: ModelServer
) -> None:
    secret = "the cellar key is under the fern"
    server.script = [
        Answer(400, {"error": {"message": secret, "code": "bad_words"}}),
    ]
    with pytest.raises(InvalidRequest, match=r"400 \(bad_words\)") as caught:
        embedder.embed([secret])
    assert "fern" not in str(caught.value)
    server.script = [Answer(413, {"error": {"code": secret}})]
    with pytest.raises(TooLarge) as caught_too:
        embedder.embed([secret])
    assert "fern" not in str(caught_too.value)


def test_a_server_that_refuses_everything_is_a_wrong_setting(
    embedder: Embedder, server: ModelServer
) -> None:
    server.script = [Answer(400), Answer(400)]
    with pytest.raises(ConfigurationError, match="a single word too"):
        embedder.embed(["a memory"])


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        [],
        {"data": []},
        {"data": [{"index": 0, "embedding": ["x"]}]},
        {"data": [{"index": 1, "embedding": [1.0] * DIMENSION}]},
        {"data": [{"index": 0, "embedding": [1.0] * DIMENSION}] * 2},
        {"data": [{"index": 0, "embedding": []}]},
        {"data": [{"index": 0, "embedding": [float("nan")] * DIMENSION}]},
        {"data": [{"index": 0, "embedding": None}]},
    ],
)
def test_nonsense_is_unavailable_not_a_vector(
    body: object, embedder: Embedder, server: ModelServer
) -> None:
    server.script = [Answer(body=body)]
    with pytest.raises(Unavailable):
        embedder.embed(["a memory"])


@pytest.mark.parametrize(
    "setting",
    [
        "openai:tiny",
        "openai:@http://host/v1",
        "openai:tiny@host:8000",
        "openai:tiny@ftp://host/v1",
        "openai:tiny@http://",
        "openai:tiny@http://host:99999/v1",
        "openai:tiny@http://user:secret@host/v1",
        "openai:tiny@http://host/v1?api-key=secret",
        "openai:tiny@http://host/v1#many",
    ],
)
def test_an_address_that_cannot_be_used_is_refused_without_repeating_a_secret(setting: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        create_embedder(setting)
    assert "secret" not in str(caught.value)
