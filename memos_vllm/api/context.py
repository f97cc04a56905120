"""What every route is handed: the catalog service, the engine, and who is asking."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ParamSpec, TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, Request

from memos_vllm.api.gateway import EngineGateway
from memos_vllm.api.keyed_locks import KeyedLocks
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import Principal
from memos_vllm.plaintext.store import PlaintextStore

P = ParamSpec("P")
T = TypeVar("T")

# SQLite has one writer; a few threads are enough to keep readers going beside it, and a separate
# limiter keeps a burst of catalog calls from using up the threads that vLLM's own routes need.
_CATALOG_THREADS = 8


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
    _limiter: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(_CATALOG_THREADS)
    )

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in a worker thread, off the event loop that streams answers."""
        return await anyio.to_thread.run_sync(
            partial(function, *args, **kwargs), limiter=self._limiter
        )


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
