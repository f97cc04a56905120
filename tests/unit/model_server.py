"""A small real HTTP server with the routes of embedding and reranking models."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import serving

DIMENSION = 8


@dataclass(frozen=True)
class Answer:
    """One answer: anything but 200 with the routes' own body."""

    status: int = 200
    body: object = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0


@dataclass(frozen=True)
class Seen:
    """One request as it came."""

    path: str
    authorization: str | None
    body: dict[str, Any]


class ModelServer:
    """Answers `script` first, then as a model of `dimension` would.

    Args:
        longest_chars: texts over this are refused with status 400.
    """

    def __init__(self) -> None:
        self.script: list[Answer] = []
        self.seen: list[Seen] = []
        self.dimension = DIMENSION
        self.longest_chars = 1_000_000
        self.url = ""

    @property
    def inputs(self) -> list[list[str]]:
        """The texts of each request to embed."""
        return [seen.body["input"] for seen in self.seen]

    def answer(self, seen: Seen) -> Answer:
        self.seen.append(seen)
        if self.script:
            scripted = self.script.pop(0)
            if scripted.body is not None or scripted.status != 200:
                return scripted
            time.sleep(scripted.delay_seconds)
        texts = [text for value in seen.body.values() if isinstance(value, list) for text in value]
        if any(len(text) > self.longest_chars for text in texts):
            error = {"message": f"too long: {texts[0]}", "code": "context_length_exceeded"}
            return Answer(400, {"error": error})
        return Answer(200, _ROUTES[seen.path](self, seen.body))

    def _embeddings(self, body: dict[str, Any]) -> object:
        data = [
            {"index": place, "embedding": vector_of(text, self.dimension), "object": "embedding"}
            for place, text in enumerate(body["input"])
        ]
        # Servers may answer in any order.
        return {"data": data[::-1], "model": body["model"]}

    def _rerank(self, body: dict[str, Any]) -> object:
        scores = [overlap(body["query"], text) for text in body["documents"]]
        ranked = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        return {"results": [{"index": n, "relevance_score": scores[n]} for n in ranked]}

    def _score(self, body: dict[str, Any]) -> object:
        scores = [overlap(body["text_1"], text) for text in body["text_2"]]
        return {"data": [{"index": n, "score": score} for n, score in enumerate(scores)]}


_ROUTES: dict[str, Callable[[ModelServer, dict[str, Any]], object]] = {
    "/v1/embeddings": ModelServer._embeddings,
    "/v1/rerank": ModelServer._rerank,
    "/score": ModelServer._score,
}


def vector_of(text: str, dimension: int) -> list[float]:
    """The vector that the server has for a text; not of length 1."""
    chance = random.Random(text)
    return [chance.gauss(0, 3) for _ in range(dimension)]


def overlap(query: str, text: str) -> float:
    """The share of the query's words in a text."""
    words = set(query.split())
    return len(words & set(text.split())) / max(1, len(words))


@contextmanager
def running_server() -> Iterator[ModelServer]:
    """A server on a loopback port until the block ends."""
    model = ModelServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = model.answer(Seen(self.path, self.headers.get("Authorization"), body))
            raw = (
                answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            )
            try:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
            except OSError:
                # The client gave up.
                self.close_connection = True

        def log_message(self, *_args: object) -> None:
            pass

    with serving(Handler) as model.url:
        yield model


class Pauses:
    """A clock on which sleeping takes no time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        return self.now
