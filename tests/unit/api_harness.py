"""A real app over a real catalog, with a fake engine, for the tests of memos_vllm.api."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import httpx
from databases import SQLITE, Database
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.types import Scope

from memos_vllm.api.gateway import EngineGateway
from memos_vllm.api.routes import build_router
from memos_vllm.cartridge.artifacts import CarriedArtifact
from memos_vllm.config import ServerSettings
from memos_vllm.control.calls import Remote, perform
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN, Principal, PrincipalKind
from memos_vllm.domain.artifact import ArtifactRecord
from memos_vllm.domain.cartridge import LoadedCube
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
        self.cartridges = FakeCartridges(Path(tempfile.gettempdir()))
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


class FakeCartridges:
    """No artifacts: what comes in is noted, and left to the jobs."""

    def __init__(self, spool_dir: Path) -> None:
        self.spool_dir = spool_dir
        self.max_import_bytes = 1 << 30
        self.carried: list[CarriedArtifact] = []
        self.adopted: list[tuple[LoadedCube, list[tuple[bytes, list[bytes]]]]] = []

    def open_artifacts(self, cube_id: str) -> list[CarriedArtifact]:
        return self.carried

    async def adopt_artifacts(
        self, loaded: LoadedCube, artifacts: Iterable[CarriedArtifact]
    ) -> list[str]:
        read = [
            (artifact.description, [content.read(size) for size, content in artifact.shards])
            for artifact in artifacts
        ]
        self.adopted.append((loaded, read))
        return [f"{len(read)} artifacts were noted"] if read else []


class FakePlaintext:
    """A search that is open and knows nothing; tests of search have the real one."""

    def __init__(self) -> None:
        self.trouble: str | None = None
        self.opened = True

    def problem(self) -> str | None:
        return self.trouble


class Everyone:
    """Lets everybody in; who may come in has tests of its own."""

    async def principal(self, scope: Scope) -> Principal:
        return LOCAL_ADMIN


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
        finish_jobs(self.mos)


def finish_jobs(mos: Mos) -> None:
    """Do what the engine's worker does, without an engine."""
    while (job := mos.claim_job("worker", lease_seconds=30)) is not None:
        mos.renew_job(job.id, "worker", lease_seconds=30, progress=0.5, message="half")
        mos.finish_job(job.id, "worker", state=JobState.SUCCEEDED, message="baked")


def build_app(
    mos: Callable[[], Mos],
    gateway: Callable[[], EngineGateway],
    plaintext: Callable[[], Any] | None = None,
) -> FastAPI:
    app = FastAPI()
    found = FakePlaintext()

    def called() -> Mos:
        """As in a running server: calls, each delivered to `Mos` by another."""
        target = mos()
        return cast(
            Mos,
            Remote(
                Mos,
                send=lambda call, _: perform(target, call),
                stream=lambda call: getattr(target, call.method)(*call.args, **call.kwargs),
            ),
        )

    app.include_router(
        build_router(
            mos=called,
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


class _LentApp:
    """An app for one test after another: building one takes longer than most of them."""

    _free: ClassVar[list[_LentApp]] = []

    def __init__(self) -> None:
        self.behind: tuple[Mos, EngineGateway, Any]
        self.app = build_app(lambda: self.behind[0], lambda: self.behind[1], lambda: self.behind[2])

    @classmethod
    @contextmanager
    def over(cls, *behind: Any) -> Iterator[FastAPI]:
        """An app that nobody else has, in front of a `Mos`, a gateway and a search."""
        lent = cls._free.pop() if cls._free else cls()
        lent.behind = (behind[0], behind[1], behind[2])
        yield lent.app
        assert not lent.app.user_middleware, "build an app of its own to change it"
        cls._free.append(lent)


@contextmanager
def open_app(
    folder: Path, database: Database = SQLITE, *, search: bool = False
) -> Iterator[tuple[FastAPI, Mos, FakeGateway, Any]]:
    """An app over a catalog in `folder`, with a real search by words when asked for."""
    url = database.create(folder)
    mos = Mos.open(url)
    gateway = FakeGateway()
    plaintext: Any = FakePlaintext()
    if search:
        plaintext = open_plaintext(ServerSettings(data_dir=folder, embedder="none"), mos)
        plaintext.start()
    try:
        with _LentApp.over(mos, gateway, plaintext) as app:
            yield app, mos, gateway, plaintext
    finally:
        if search:
            plaintext.close()
        mos.close()
        database.remove(url)


@asynccontextmanager
async def serve(
    folder: Path, database: Database = SQLITE, *, search: bool = False
) -> AsyncIterator[Served]:
    """A client of such an app."""
    with open_app(folder, database, search=search) as (app, mos, gateway, plaintext):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            yield Served(client, mos, gateway, plaintext, app)


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a reply that must have this status and OpenAI's shape."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert error["message"]
    assert error["type"]
    return error
