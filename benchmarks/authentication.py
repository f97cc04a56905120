"""What the guard adds to a request: the key's look-up, the route table and the body's inspection.

    python -m benchmarks.authentication

Times an app that answers at once, bare and behind the guard, over a real catalog: with the lease
as it is, where one request a second asks the catalog, and with every request asking it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memos_vllm.api import authentication
from memos_vllm.api.authentication import STATE, Authenticator
from memos_vllm.api.middleware import MemosGuard
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.domain.keys import draw_key


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that reads its body and says that it did."""
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def request_of(app: Starlette, token: str, body: bytes) -> Callable[[ASGIApp], Any]:
    """A coroutine that sends one chat, and fails unless it is let in."""

    async def send_to(target: ASGIApp) -> None:
        scope = {
            "type": "http",
            "app": app,
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": [
                (b"content-type", b"application/json"),
                (b"authorization", f"Bearer {token}".encode()),
            ],
        }

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            assert message.get("status", 200) == 200, message

        await target(scope, receive, send)

    return send_to


async def time_requests(target: ASGIApp, send_to: Callable[[ASGIApp], Any], count: int) -> str:
    samples = []
    for _ in range(count):
        begun = time.perf_counter()
        await send_to(target)
        samples.append((time.perf_counter() - begun) * 1e6)
    cuts = statistics.quantiles(samples, n=100)
    return f"p50 {cuts[49]:7.1f} µs   p99 {cuts[98]:7.1f} µs"


async def measure(folder: Path, count: int) -> None:
    mos = Mos.open(f"sqlite:///{folder}/catalog.sqlite")
    mos.create_key(LOCAL_ADMIN, "ops", draw_key().digest)
    drawn = draw_key()
    mos.create_key(LOCAL_ADMIN, "alice", drawn.digest)
    app = Starlette()
    setattr(app.state, STATE, Authenticator(lambda: mos))
    for size in (1_000, 100_000):
        body = json.dumps({"model": "smol", "messages": "x" * size, "memcube_id": "a"}).encode()
        send_to = request_of(app, drawn.token, body)
        print(f"chat of {size} bytes")
        print("  bare            ", await time_requests(answer, send_to, count))
        print("  guarded         ", await time_requests(MemosGuard(answer), send_to, count))
        kept, authentication.LEASE_SECONDS = authentication.LEASE_SECONDS, 0.0
        print("  guarded, no lease", await time_requests(MemosGuard(answer), send_to, count // 10))
        authentication.LEASE_SECONDS = kept
    mos.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    options = parser.parse_args()
    print(f"{platform.machine()}, Python {sys.version.split()[0]}, {options.requests} requests")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), options.requests))


if __name__ == "__main__":
    main()
