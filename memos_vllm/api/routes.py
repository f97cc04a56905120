"""Every HTTP route of memos_vllm but the chat, as one router."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Depends, Request

from memos_vllm.api import (
    audit,
    cartridges,
    cubes,
    documents,
    examples,
    grants,
    jobs,
    keys,
    memories,
    search,
    service,
    turns,
)
from memos_vllm.api.context import ApiContext, bind
from memos_vllm.api.gateway import EngineGateway
from memos_vllm.api.replies import ErrorReply
from memos_vllm.api.route import MemosRoute
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import Principal
from memos_vllm.plaintext.store import PlaintextStore

_SUBJECTS = (
    cubes.router,
    cartridges.router,
    cartridges.streamed,
    memories.router,
    documents.router,
    turns.router,
    search.router,
    jobs.router,
    keys.router,
    grants.router,
    audit.router,
    service.router,
)


def build_router(
    *,
    mos: Callable[[], Mos],
    plaintext: Callable[[], PlaintextStore],
    gateway: Callable[[], EngineGateway],
    principal: Callable[[Request], Principal],
    tombstone_key: Callable[[], bytes],
) -> APIRouter:
    """Build the router, to be included in vLLM's app.

    Args:
        mos: the catalog service; may raise Unavailable until it has started.
        plaintext: search; may raise Unavailable until it has started.
        gateway: the engine; may raise Unavailable until it has started.
        principal: who sent a request.
        tombstone_key: key of the hash that stays in the audit log of an erased memory's text.
    """
    api = ApiContext(
        mos=mos,
        plaintext=plaintext,
        gateway=gateway,
        principal=principal,
        tombstone_key=tombstone_key,
    )
    router = APIRouter(
        route_class=MemosRoute,
        dependencies=[Depends(bind(api))],
        responses=examples.refusals(ErrorReply),
    )
    for subject in _SUBJECTS:
        router.include_router(subject)
    return router
