"""The client itself: `MOS` blocks, `AsyncMOS` is awaited; their calls are written here once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import httpx

from memos_vllm.client.chat import AwaitedChat, BlockingChat, ask_models
from memos_vllm.client.cube import (
    AsyncCube,
    Cube,
    if_match,
    nothing,
    raw_object,
)
from memos_vllm.client.flow import Listing, listing, operation
from memos_vllm.client.jobs import JOB_TIMEOUT_SECONDS, read_job, wait_for_job
from memos_vllm.client.objects import CubeInfo, Health, JobInfo, Json, Page, page_of
from memos_vllm.client.session import RetryPolicy, Session
from memos_vllm.client.steps import Flow
from memos_vllm.client.wire import Call, path_part

CubeT = TypeVar("CubeT")

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_RETRY = RetryPolicy()
# uvicorn closes an idle connection after 5 s; given up before, none is used while it closes.
_LIMITS = httpx.Limits(max_connections=100, keepalive_expiry=4.0)


class MosCalls(Generic[CubeT]):
    """The calls of the server, as flows; `MOS` and `AsyncMOS` run them."""

    _session: Session

    @abstractmethod
    def cube(self, cube_id: str) -> CubeT:
        """A handle of a cube; nothing is asked from the server."""

    @operation
    def create_cube(
        self,
        cube_id: str | None = None,
        *,
        name: str | None = None,
        description: str | None = None,
        preamble: str | None = None,
        labels: Sequence[str] = (),
    ) -> Flow[CubeT]:
        """Make a cube.

        Args:
            cube_id: the server makes one up when not given.
            preamble: text that opens the cube's activation memory.
        Raises:
            ApiConflict: the id is taken.
        """
        body: dict[str, object] = {
            field: value
            for field, value in {
                "id": cube_id,
                "name": name,
                "description": description,
                "preamble": preamble,
                "labels": list(labels) or None,
            }.items()
            if value is not None
        }
        created = yield from self._session.call(
            Call("POST", "/v1/memcubes", CubeInfo.from_json, body=body)
        )
        return self.cube(created.id)

    @operation
    def get_cube(self, cube_id: str) -> Flow[CubeInfo]:
        """The state of a cube."""
        path = f"/v1/memcubes/{path_part(cube_id, 'cube')}"
        return self._session.call(Call("GET", path, CubeInfo.from_json))

    @listing
    def cubes(self, *, limit: int | None = None) -> Listing[CubeInfo]:
        """Every cube that this key may read, fetched page by page as they are iterated over."""

        def fetch(size: int, cursor: str | None) -> Flow[Page[CubeInfo]]:
            query = {"limit": size, "cursor": cursor}
            return self._session.call(
                Call("GET", "/v1/memcubes", page_of(CubeInfo.from_json), query=query)
            )

        return Listing(fetch, limit=limit)

    @operation
    def delete_cube(self, cube_id: str, *, version: int | None = None) -> Flow[None]:
        """Delete a cube and everything compiled from it.

        Args:
            version: refuse with ApiStaleVersion unless the cube is at this version.
        """
        path = f"/v1/memcubes/{path_part(cube_id, 'cube')}"
        return self._session.call(Call("DELETE", path, nothing, headers=if_match(version)))

    @operation
    def job(self, job_id: str) -> Flow[JobInfo]:
        """A job as it is now."""
        return read_job(self._session, job_id)

    @operation
    def cancel_job(self, job_id: str) -> Flow[JobInfo]:
        """Stop a job that has not ended."""
        path = f"/v1/jobs/{path_part(job_id, 'job')}"
        # Its answer is the job, so a repeat after a lost answer must not read as "gone".
        return self._session.call(Call("DELETE", path, JobInfo.from_json, repeatable=False))

    @operation
    def wait_for_job(
        self,
        job_id: str,
        *,
        timeout_seconds: float = JOB_TIMEOUT_SECONDS,
        on_progress: Callable[[JobInfo], None] | None = None,
    ) -> Flow[JobInfo]:
        """Wait until a job has ended.

        Args:
            on_progress: called with the job each time it was read.
        Raises:
            JobFailed: it failed or was cancelled.
            JobTimeout: it is still going.
        """
        job = yield from read_job(self._session, job_id)
        return (
            yield from wait_for_job(
                self._session, job, timeout_seconds=timeout_seconds, on_progress=on_progress
            )
        )

    @operation
    def models(self) -> Flow[tuple[str, ...]]:
        """The names that this server takes as `model`, the served model first."""
        return ask_models(self._session)

    @operation
    def status(self) -> Flow[Json]:
        """Versions, model fingerprint, stores, residency budget and use."""
        return self._session.call(Call("GET", "/v1/memos/status", raw_object))

    @operation
    def health(self) -> Flow[Health]:
        """Whether the server is ready, and which part is not; a server that is not is no error.

        Raises:
            ServerUnreachable: no server answers at all.
        """
        call = Call("GET", "/health", raw_or_empty, accept=frozenset({503}), repeatable=False)
        body = yield from self._session.call(call)
        parts = body.get("parts")
        parts = {str(part): str(state) for part, state in (parts or {}).items()}
        status = body.get("status", "ready")
        whole = status in {"ready", "ok"} and all(state == "ready" for state in parts.values())
        degraded = status == "degraded"
        return Health(ready=whole or degraded, degraded=degraded, parts=parts, raw=body)

    @operation
    def verify_audit(self) -> Flow[Json]:
        """Whether the audit log's hash chain is whole, and where it breaks if not."""
        return self._session.call(Call("GET", "/v1/audit/verify", raw_object))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._session.base_url)!r})"


class MOS(MosCalls[Cube], BlockingChat):
    """A client of a memos_vllm server. Safe to share between threads; close it when done.

    Args:
        base_url: the server's root; a trailing `/v1` is taken off.
        api_key: sent as `Authorization: Bearer`.
        timeout: seconds to wait for an ordinary answer.
        chat_timeout: seconds to wait for (each part of) a generated answer, or for a document to
            be read.
        retry: when calls that may be repeated are repeated.
        transport: an httpx transport in place of the network.
    Raises:
        ConfigurationError: an argument cannot be used.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        chat_timeout: float = 600.0,
        retry: RetryPolicy = DEFAULT_RETRY,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        session = Session(
            base_url,
            api_key=api_key,
            timeout_seconds=timeout,
            chat_timeout_seconds=chat_timeout,
            retry=retry,
        )
        # A proxy from the environment has no way to this machine's own loopback address.
        trust_env = not session.is_loopback
        super().__init__(
            session, httpx.Client(transport=transport, trust_env=trust_env, limits=_LIMITS)
        )

    def cube(self, cube_id: str) -> Cube:
        path_part(cube_id, "cube")
        return Cube(cube_id, self._session, self._http)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> MOS:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class AsyncMOS(MosCalls[AsyncCube], AwaitedChat):
    """MOS, awaited: `await mos.create_cube(...)`, `async for cube in mos.cubes()`.

    Arguments as of MOS. Use it in one event loop and close it there with `aclose`.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        chat_timeout: float = 600.0,
        retry: RetryPolicy = DEFAULT_RETRY,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        session = Session(
            base_url,
            api_key=api_key,
            timeout_seconds=timeout,
            chat_timeout_seconds=chat_timeout,
            retry=retry,
        )
        trust_env = not session.is_loopback
        super().__init__(
            session, httpx.AsyncClient(transport=transport, trust_env=trust_env, limits=_LIMITS)
        )

    def cube(self, cube_id: str) -> AsyncCube:
        path_part(cube_id, "cube")
        return AsyncCube(cube_id, self._session, self._http)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncMOS:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()


def raw_or_empty(body: object) -> Json:
    """vLLM's own /health has an empty body."""
    return {} if body is None else raw_object(body)
