"""An app behind the real guard, over a real catalog whose failures and clock a test decides."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from api_harness import FakeGateway, FakePlaintext
from catalog_kit import ADMIN, Desk, open_desk
from fastapi import FastAPI, Request, WebSocket

from memos_vllm.api.authentication import STATE, Authenticator, principal_in
from memos_vllm.api.middleware import MemosGuard
from memos_vllm.api.routes import build_router
from memos_vllm.control.mos import Mos
from memos_vllm.domain.keys import draw_key

SERVED = "smol"


class Watched:
    """The catalog service, its questions counted, and down when told so."""

    def __init__(self, mos: Mos) -> None:
        self._mos = mos
        self.failure: Exception | None = None
        self.away = False
        self.before: Callable[[], None] = lambda: None
        self.asked: list[str] = []

    @property
    def questions(self) -> int:
        """How often it was asked whom a key stands for."""
        return self.asked.count("authenticate")

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._mos, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.asked.append(name)
            self.before()
            if self.failure is not None:
                raise self.failure
            return method(*args, **kwargs)

        return call


@dataclass
class Ticks:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Guarded:
    """The app, and what is behind its guard."""

    app: FastAPI
    desk: Desk
    mos: Watched
    authenticator: Authenticator
    client: httpx.AsyncClient
    ticks: Ticks = field(default_factory=Ticks)

    def key(self, name: str, **fields: Any) -> str:
        drawn = draw_key()
        self.desk.mos.create_key(ADMIN, name, drawn.digest, **fields)
        return drawn.token

    def advance(self, seconds: float) -> None:
        self.ticks.now += seconds
        self.desk.clock.advance(seconds)

    async def get(self, path: str, *keys: str, **options: Any) -> httpx.Response:
        return await self.client.get(path, headers=bearer(*keys), **options)

    async def who(self, *keys: str) -> str:
        """The principal as whom the keys get in, or else the status."""
        reply = await self.get("/v1/principals/me", *keys)
        return str(reply.json()["id"] if reply.status_code == 200 else reply.status_code)


def bearer(*keys: str) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {key}") for key in keys]


def _add_vllms_routes(app: FastAPI) -> None:
    """Echoes under names of vLLM's routes."""

    async def echo(request: Request) -> dict[str, Any]:
        body = await request.body()
        return {"principal": principal_in(request.scope).id, "bytes": len(body)}

    for path in ("/metrics", "/v1/models", "/sleep", "/of/a/later/vllm", "/v1/completions"):
        app.add_api_route(path, echo, methods=["GET", "POST"])
    app.add_api_route("/invocations", echo, methods=["POST"])
    app.add_api_route("/v1/audio/transcriptions", echo, methods=["POST"])

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(principal_in(socket.scope).id)
        await socket.close()


@asynccontextmanager
async def guarded(folder: Path) -> AsyncIterator[Guarded]:
    with open_desk(folder, cube=False) as desk:
        mos, ticks = Watched(desk.mos), Ticks()
        real: Any = mos
        authenticator = Authenticator(
            lambda: real,
            is_down=lambda: mos.away,
            clock=ticks,
            now=desk.clock,
            batch_seconds=0.0,
        )
        app = FastAPI()
        app.state.args = SimpleNamespace(
            allowed_origins=[], served_model_name=[SERVED], model="/models/smol"
        )
        setattr(app.state, STATE, authenticator)
        app.include_router(
            build_router(
                mos=lambda: real,
                plaintext=FakePlaintext,  # type: ignore[arg-type]
                gateway=FakeGateway,
                principal=lambda request: principal_in(request.scope),
                tombstone_key=lambda: b"k" * 32,
            )
        )
        _add_vllms_routes(app)
        app.add_middleware(MemosGuard)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            yield Guarded(app, desk, mos, authenticator, client, ticks)
