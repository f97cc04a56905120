"""A small real HTTP server that streams chat completions as vLLM's does, for the load client."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import serving

UNKNOWN = "unknown-cube"
BREAKING = "breaking-cube"
SLOW = "slow-cube"
SLOW_SECONDS = 2.5
PROMPT_TOKENS = 640


@dataclass
class StreamServer:
    """What it was asked, and how many chats it had at once."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The role with the first token, a chunk a token, then the usage."""
        cube, tokens = body.get("memcube_id"), body["max_completion_tokens"]
        if cube == SLOW:
            time.sleep(SLOW_SECONDS)
        yield _delta(role="assistant", content="")
        for number in range(tokens):
            if cube == BREAKING and number == 2:
                yield {"error": {"message": "the engine died", "code": 500}}
                return
            yield _delta(content=" a")
            time.sleep(0.01)
        with self.lock:
            self.sources["plain" if cube is None else "resident"] += 1
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens}
        yield {"choices": [], "usage": usage, "memos": {"activation": {"source": "resident"}}}

    def metrics(self) -> str:
        with self.lock:
            lines = [
                f'memos_requests_total{{engine="0",kind="{kind}"}} {count}.0'
                for kind, count in self.sources.items()
            ]
        return "\n".join(["# TYPE memos_requests_total counter", *lines, ""])

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self.lock:
                self.at_once -= 1


def _delta(**delta: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta}]}


@contextmanager
def stream_server() -> Iterator[StreamServer]:
    """A server on a loopback port until the block ends."""
    state = StreamServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._whole(200, state.metrics().encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.bodies.append(body)
                state.headers.append({key.lower(): value for key, value in self.headers.items()})
            if body.get("memcube_id") == UNKNOWN:
                self._whole(404, b"{}")
                return
            with state.counted():
                self._stream(body)

        def _stream(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in state.events(body):
                self._chunk(f"data: {json.dumps(event)}\n\n")
            self._chunk("data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")

        def _chunk(self, text: str) -> None:
            self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())

        def _whole(self, status: int, raw: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_args: object) -> None:
            pass

    with serving(Handler) as state.url:
        yield state
