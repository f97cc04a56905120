"""A real app over a real catalog, with a fake engine, for the tests of memos_vllm.api."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response

from memos_vllm.api.gateway import EngineGateway
from memos_vllm.api.routes import build_router
from memos_vllm.config import ServerSettings
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN, Principal, PrincipalKind
from memos_vllm.domain.artifact import ArtifactRecord
from memos_vllm.domain.ids import PrincipalId
from memos_vllm.domain.job import JobState
from memos_vllm.plaintext.assembly import open_plaintext

# What vLLM's own exception handlers would answer; none of our errors may get that far.
ESCAPED = 599


class FakeGateway:
    """An engine that bakes nothing: it notes what it was asked."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {"engine": "ready"}
        self.discarded: list[ArtifactRecord] = []
        self.checked: list[tuple[str, list[str] | None]] = []
        self.resident: dict[str, int] = {}
        self.refusal: Exception | None = None
        self.discard_failure: Exception | None = None
        self.on_wake: Callable[[], None] = lambda: None
        self.wakes = 0

    async def status(self) -> Mapping[str, object]:
        return {"model": "fake", "residency": {"budget_tokens": 10, "used_tokens": 0}}

    async def health(self) -> Mapping[str, str]:
        return self.parts

    async def discard_artifacts(self, records: Sequence[ArtifactRecord]) -> None:
        if self.discard_failure is not None:
            raise self.discard_failure
        self.discarded.extend(records)

    async def check_composition(self, cube_id: str, *, adding: Sequence[str] | None) -> None:
        self.checked.append((cube_id, None if adding is None else list(adding)))
        if self.refusal is not None:
            raise self.refusal

    def resident_tokens(self, cube_id: str) -> int:
        return self.resident.get(cube_id, 0)

    def wake_jobs(self) -> None:
        self.wakes += 1
        self.on_wake()


class FakePlaintext:
    """A search that is open and knows nothing; tests of search have the real one."""

    def __init__(self) -> None:
        self.trouble: str | None = None
        self.opened = True

    def problem(self) -> str | None:
        return self.trouble


def _requester(request: Request) -> Principal:
    name = request.headers.get("x-test-principal")
    if name is None:
        return LOCAL_ADMIN
    return Principal(PrincipalId(name), PrincipalKind.USER)


@dataclass
class Served:
    """A running app and what is behind it."""

    client: httpx.AsyncClient
    mos: Mos
    gateway: FakeGateway
    plaintext: Any
    app: FastAPI
    extra: dict[str, Any] = field(default_factory=dict)

    async def cube(self, cube_id: str = "acme") -> dict[str, Any]:
        reply = await self.client.post("/v1/memcubes", json={"id": cube_id})
        assert reply.status_code == 201, reply.text
        created: dict[str, Any] = reply.json()
        return created

    async def memories(self, *texts: str, cube_id: str = "acme") -> list[dict[str, Any]]:
        reply = await self.client.post(
            f"/v1/memcubes/{cube_id}/memories",
            json={"memories": [{"text": text} for text in texts]},
        )
        assert reply.status_code == 201, reply.text
        added: list[dict[str, Any]] = reply.json()["data"]
        return added

    def finish_jobs(self) -> None:
        """Do what the engine's worker does, without an engine."""
        while (job := self.mos.claim_job("worker", lease_seconds=30)) is not None:
            self.mos.renew_job(job.id, "worker", lease_seconds=30, progress=0.5, message="half")
            self.mos.finish_job(job.id, "worker", state=JobState.SUCCEEDED, message="baked")


def build_app(
    mos: Callable[[], Mos],
    gateway: Callable[[], EngineGateway],
    plaintext: Callable[[], Any] | None = None,
) -> FastAPI:
    app = FastAPI()
    found = FakePlaintext()
    app.include_router(
        build_router(
            mos=mos,
            plaintext=plaintext or (lambda: found),
            gateway=gateway,
            principal=_requester,
            tombstone_key=lambda: b"k" * 32,
        )
    )

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(Exception)
    async def escaped(request: Request, error: Exception) -> Response:
        return JSONResponse({"escaped": repr(error)}, status_code=ESCAPED)

    return app


@asynccontextmanager
async def serve(folder: Path, *, search: bool = False) -> AsyncIterator[Served]:
    """An app over a catalog in `folder`, with a real search by words when asked for."""
    mos = Mos.open(f"sqlite:///{folder}/catalog.sqlite")
    gateway = FakeGateway()
    plaintext: Any = FakePlaintext()
    if search:
        plaintext = open_plaintext(ServerSettings(data_dir=folder, embedder="none"), mos)
        plaintext.start()
    app = build_app(lambda: mos, lambda: gateway, lambda: plaintext)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            yield Served(client, mos, gateway, plaintext, app)
    finally:
        if search:
            plaintext.close()
        mos.close()


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a reply that must have this status and OpenAI's shape."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert error["message"]
    assert error["type"]
    return error
