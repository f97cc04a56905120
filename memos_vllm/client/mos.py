"""The client itself: `MOS` blocks, `AsyncMOS` is awaited; their calls are written here once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import datetime
from typing import Generic, TypeVar

import httpx

from memos_vllm.client.audit import aexport_parts, audit_listing, audit_query, export_parts
from memos_vllm.client.cartridge import FilePath, MemoryDifference, OnBytes, upload
from memos_vllm.client.chat import AwaitedChat, BlockingChat, ask_models
from memos_vllm.client.cube import (
    AsyncCube,
    Cube,
    CubeCalls,
    if_match,
    nothing,
)
from memos_vllm.client.flow import Listing, listing, operation
from memos_vllm.client.jobs import JOB_TIMEOUT_SECONDS, read_job, wait_for_job
from memos_vllm.client.keys import KeyInfo, NewKey, PrincipalInfo
from memos_vllm.client.objects import CubeInfo, Health, JobInfo, Json, Page, page_of, raw_object
from memos_vllm.client.session import RetryPolicy, Session
from memos_vllm.client.sessions import (
    AsyncCubeSession,
    CubeSession,
    cube_id_of,
    ensure_cube,
    session_names,
)
from memos_vllm.client.steps import Flow
from memos_vllm.client.wire import Call, encode_time, path_part
from memos_vllm.domain.keys import public_part

CubeT = TypeVar("CubeT", bound=CubeCalls)
SessionT = TypeVar("SessionT")

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_RETRY = RetryPolicy()
# uvicorn closes an idle connection after 5 s; given up before, none is used while it closes.
_LIMITS = httpx.Limits(max_connections=100, keepalive_expiry=4.0)


class MosCalls(Generic[CubeT, SessionT]):
    """The calls of the server, as flows; `MOS` and `AsyncMOS` run them."""

    _session: Session

    @abstractmethod
    def cube(self, cube_id: str) -> CubeT:
        """A handle of a cube; nothing is asked from the server."""

    @abstractmethod
    def _session_of(self, names: tuple[str, str, Sequence[str]]) -> SessionT:
        """A handle of a session; nothing is asked from the server."""

    @operation
    def user_cube(self, user: str) -> Flow[CubeT]:
        """The cube of a user, `user.NAME`, made if it is not there."""
        cube_id = cube_id_of("user", user)
        yield from ensure_cube(self._session, cube_id)
        return self.cube(cube_id)

    @operation
    def agent_cube(self, agent: str) -> Flow[CubeT]:
        """The cube of an agent, `agent.NAME`, made if it is not there."""
        cube_id = cube_id_of("agent", agent)
        yield from ensure_cube(self._session, cube_id)
        return self.cube(cube_id)

    @operation
    def open_session(
        self, user: str, *, domains: Sequence[str] = (), session_id: str | None = None
    ) -> Flow[SessionT]:
        """Open a session of a user over shared cubes; `with` closes it.

        Args:
            domains: ids of cubes that its chats use first, such as a handbook's.
            session_id: of a session to go on with; a new one when not given.
        """
        names = session_names(user, domains, session_id)
        yield from ensure_cube(self._session, names[1])
        yield from ensure_cube(self._session, names[0])
        return self._session_of(names)

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
    def import_cube(
        self,
        path: FilePath,
        id: str | None = None,  # noqa: A002 - the contract's word
        *,
        trust_artifacts: bool = True,
        replace: bool = False,
        on_bytes: OnBytes | None = None,
    ) -> Flow[CubeT]:
        """Make a cube of a `.memcube` file; its `arrival` says what became of what was in it.

        Args:
            id: in place of the one it had; memories then get new ids, too.
            trust_artifacts: False computes KV and vectors from the text instead of taking them.
            replace: take the place of the cube that has the id; owner and grants stay.
            on_bytes: told how many bytes were sent.
        Raises:
            ApiConflict: the id is taken.
            ApiBadRequest, ApiTooLarge: the file is damaged, or nothing that a server takes.
            OSError: it cannot be read.
        """
        arrival = yield from upload(
            self._session,
            path,
            cube_id=id,
            trust_artifacts=trust_artifacts,
            replace=replace,
            on_bytes=on_bytes,
        )
        cube = self.cube(arrival.info.id)
        cube.arrival = arrival
        return cube

    @listing
    def diff(
        self, cube_id: str, other_id: str, *, limit: int | None = None
    ) -> Listing[MemoryDifference]:
        """What only one of two cubes has, and what was changed in one of them."""
        path = f"/v1/memcubes/{path_part(cube_id, 'cube')}/diff"

        def fetch(size: int, cursor: str | None) -> Flow[Page[MemoryDifference]]:
            query: dict[str, str | int | None] = {"with": other_id, "limit": size, "cursor": cursor}
            call = Call("GET", path, page_of(MemoryDifference.from_json), query=query)
            return self._session.call(call)

        return Listing(fetch, limit=limit)

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
    def create_key(
        self,
        principal: str,
        *,
        admin: bool | None = None,
        kind: str | None = None,
        expires_at: datetime | None = None,
    ) -> Flow[NewKey]:
        """Make a key; only an administrator may. `token` of the result is shown this once.

        Args:
            principal: whom the key stands for; made if unknown.
            admin: what a new principal is to be; the first key's is an administrator anyway.
            kind: user (the default), agent or service.
        Raises:
            ApiConflict: the principal has keys and is something else.
        """
        given = {"principal": principal, "admin": admin, "kind": kind}
        body: dict[str, object] = {
            name: value for name, value in given.items() if value is not None
        }
        if expires_at is not None:
            body["expires_at"] = encode_time(expires_at, param="expires_at")
        # Sent again after a lost answer, it would make a second key.
        return self._session.call(
            Call("POST", "/v1/keys", NewKey.from_json, body=body, repeatable=False)
        )

    @operation
    def revoke_key(self, key: str) -> Flow[KeyInfo]:
        """Make a key worthless, by its id or prefix; only an administrator may."""
        path = f"/v1/keys/{path_part(public_part(key), 'key')}"
        # Its answer is the key, so a repeat after a lost answer must not read as "gone".
        return self._session.call(Call("DELETE", path, KeyInfo.from_json, repeatable=False))

    @listing
    def api_keys(self, *, limit: int | None = None) -> Listing[KeyInfo]:
        """Every key that was ever made, fetched page by page; only an administrator may."""

        def fetch(size: int, cursor: str | None) -> Flow[Page[KeyInfo]]:
            query = {"limit": size, "cursor": cursor}
            return self._session.call(
                Call("GET", "/v1/keys", page_of(KeyInfo.from_json), query=query)
            )

        return Listing(fetch, limit=limit)

    @operation
    def whoami(self) -> Flow[PrincipalInfo]:
        """Whom this client's key stands for."""
        return self._session.call(Call("GET", "/v1/principals/me", PrincipalInfo.from_json))

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

    @listing
    def audit(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int | None = None,
    ) -> Listing[Json]:
        """The audit log of all cubes, newest first; for administrators.

        Args:
            actor: only what this principal did.
            action: only this, such as "memory.update".
            since, until: only at or after, and before, these times.
            limit: at most this many in all.
        """
        query = audit_query(actor=actor, action=action, since=since, until=until)
        return audit_listing(self._session, "/v1/audit", query, limit=limit)

    @operation
    def verify_audit(self) -> Flow[Json]:
        """Whether the audit log's hash chain is whole, and where not; for administrators."""
        return self._session.call(Call("GET", "/v1/audit/verify", raw_object))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._session.base_url)!r})"


class MOS(MosCalls[Cube, CubeSession], BlockingChat):
    """A client of a memos_vllm server. Safe to share between threads; close it when done.

    Args:
        base_url: the server's root; a trailing `/v1` is taken off.
        api_key: sent as `Authorization: Bearer`; MEMOS_API_KEY when not given, "" for none.
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
            api_key=_key(api_key),
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

    def _session_of(self, names: tuple[str, str, Sequence[str]]) -> CubeSession:
        return CubeSession(names, self._session, self._http)

    def export_audit(self) -> Iterator[bytes]:
        """The whole audit log, oldest first, as lines of JSON; in parts as they come."""
        return export_parts(self, "/v1/audit/export")

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> MOS:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class AsyncMOS(MosCalls[AsyncCube, AsyncCubeSession], AwaitedChat):
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
            api_key=_key(api_key),
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

    def _session_of(self, names: tuple[str, str, Sequence[str]]) -> AsyncCubeSession:
        return AsyncCubeSession(names, self._session, self._http)

    def export_audit(self) -> AsyncIterator[bytes]:
        """`MOS.export_audit`, awaited."""
        return aexport_parts(self, "/v1/audit/export")

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncMOS:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()


def _key(given: str | None) -> str | None:
    """The key to send: the one given, or the environment's."""
    if given is not None:
        return given
    # It takes longer to import than the rest of the client.
    from memos_vllm.config import ClientSettings

    return ClientSettings().api_key


def raw_or_empty(body: object) -> Json:
    """vLLM's own /health has an empty body."""
    return {} if body is None else raw_object(body)
