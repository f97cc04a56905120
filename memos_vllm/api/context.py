"""What every route is handed: the catalog service, the engine, and who is asking."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, ParamSpec, TypeVar

from fastapi import Depends, Request

from memos_vllm.api.gateway import EngineGateway
from memos_vllm.api.keyed_locks import KeyedLocks
from memos_vllm.api.threads import Threads
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import Principal
from memos_vllm.plaintext.store import PlaintextStore

P = ParamSpec("P")
T = TypeVar("T")

# Apart from the threads that vLLM's own routes need, and from each other: SQLite has one writer,
# and those that wait for it must not keep readers waiting.
_READERS = 8
_WRITERS = 8


@dataclass(frozen=True)
class ApiContext:
    """One per router. `mos`, `plaintext` and `gateway` are looked up per request: they start after
    the routes.

    Each may raise Unavailable while it is not there yet.
    """

    mos: Callable[[], Mos]
    plaintext: Callable[[], PlaintextStore]
    gateway: Callable[[], EngineGateway]
    principal: Callable[[Request], Principal]
    tombstone_key: Callable[[], bytes]
    locks: KeyedLocks = field(default_factory=KeyedLocks)
    _readers: Threads = field(default_factory=lambda: Threads(_READERS))
    _writers: Threads = field(default_factory=lambda: Threads(_WRITERS))

    async def read(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in a worker thread, off the event loop that streams answers."""
        return await self._readers.run(function, *args, **kwargs)

    async def write(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `read`, for what may wait for another writer."""
        return await self._writers.run(function, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class Call:
    """One request: the context and the principal who sent it."""

    api: ApiContext
    actor: Principal
    request: Request

    @property
    def mos(self) -> Mos:
        return self.api.mos()

    @property
    def gateway(self) -> EngineGateway:
        return self.api.gateway()


def bind(api: ApiContext) -> Callable[[Request], Awaitable[None]]:
    """Make the dependency that gives a router's requests their context."""

    async def remember(request: Request) -> None:
        request.state.memos_api = api

    return remember


async def _current_api(request: Request) -> ApiContext:
    api: ApiContext = request.state.memos_api
    return api


CurrentApi = Annotated[ApiContext, Depends(_current_api)]


async def _current_call(request: Request, api: CurrentApi) -> Call:
    return Call(api=api, actor=api.principal(request), request=request)


CurrentCall = Annotated[Call, Depends(_current_call)]
