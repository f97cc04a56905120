"""Routes of the service itself: health and status."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

import memos_vllm
from memos_vllm.api import examples
from memos_vllm.api.context import ApiContext, CurrentApi, CurrentCall
from memos_vllm.api.error_table import error_response
from memos_vllm.api.middleware import guard_counters
from memos_vllm.api.replies import HealthReply, NotReadyReply, render
from memos_vllm.api.route import MemosRoute
from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.errors import MemosError, Unavailable

router = APIRouter(route_class=MemosRoute, tags=["service"])

_READY = "ready"
_RETRY_AFTER_SECONDS = 2
# The one part without which chats go on.
_SEARCH = "plaintext"


@router.get(
    "/health",
    summary="Say whether every part is ready",
    response_model=HealthReply,
    responses={
        **examples.answers(examples.HEALTH, 200),
        503: examples.unavailable(
            NotReadyReply, status="not_ready", parts={"engine": "memory is still starting"}
        ),
    },
)
async def health(api: CurrentApi) -> Response:
    """200 when everything is ready, or `degraded` when only search is down; otherwise 503. Parts
    that are not ready say why."""
    parts = await _parts(api)
    waiting = [f"{name}: {state}" for name, state in parts.items() if state != _READY]
    if not waiting:
        return render(HealthReply(status="ready", parts=parts))
    others_ready = all(parts[name] == _READY for name in parts if name != _SEARCH)
    if others_ready and await api.read(lambda: api.plaintext().opened):
        # Chats go on with activation memory, so the server keeps its traffic.
        return render(HealthReply(status="degraded", parts=parts))
    return error_response(
        Unavailable(f"not ready: {'; '.join(waiting)}", retry_after_seconds=_RETRY_AFTER_SECONDS),
        extra=HealthReply(status="not_ready", parts=parts).model_dump(),
    )


async def _parts(api: ApiContext) -> dict[str, str]:
    parts = {"catalog": _READY, "engine": _READY, _SEARCH: _READY}
    try:
        await api.read(lambda: api.mos().list_cubes(LOCAL_ADMIN, limit=1, cursor=None))
    except MemosError as error:
        parts["catalog"] = str(error)
    try:
        parts.update(await api.gateway().health())
    except MemosError as error:
        parts["engine"] = str(error)
    try:
        problem = await api.read(lambda: api.plaintext().problem())
        parts[_SEARCH] = problem or _READY
    except MemosError as error:
        parts[_SEARCH] = str(error)
    return parts


@router.get(
    "/v1/memos/status",
    summary="Read the server's state",
    response_model=dict[str, object],
    responses=examples.answers(examples.STATUS, 200),
)
async def status(call: CurrentCall) -> Response:
    """Versions, model fingerprint, stores, residency budget and use, and what was refused."""
    return JSONResponse(
        {
            "object": "memos.status",
            "version": memos_vllm.__version__,
            **await call.gateway.status(),
            "guard": dict(guard_counters),
        }
    )
