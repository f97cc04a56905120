"""The request guard, for vLLM's `--middleware memos_vllm.api.middleware.MemosGuard`.

It stands in front of every route and socket of the server. It lets in whoever has a key
(`memos_vllm.api.authentication`) to the routes that the table opens to them
(`memos_vllm.api.route_access`), and to no model that is hidden from them
(`memos_vllm.api.model_access`).

Memory fields (`memcube_id` and its kin) on a route that does not take them are refused, because a
route that ignored them would answer without the memory that the caller asked for.
`kv_transfer_params`, wherever vLLM would read it, is removed and counted: only our own serving code
may attach a ticket, and it does so behind this guard. Forms (audio uploads) of administrators are
streamed through unread: their answer to forged parameters is the ticket's signature.

vLLM's development routes that put other weights into the running model are refused: stored KV is
named by the weights that the server started with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memos_vllm.api.authentication import authenticator_of, principal_in, with_principal
from memos_vllm.api.body_guard import GuardedBody, UnreadableBodyError, guard_body, is_suspect
from memos_vllm.api.error_table import error_response
from memos_vllm.api.model_access import (
    ADAPTER_IN_JSON,
    refuse_adapter,
    refuse_adapter_in_form,
    refuse_adapter_in_headers,
    unknown_model_response,
)
from memos_vllm.api.route_access import Audience, audience, leads_somewhere
from memos_vllm.errors import (
    Conflict,
    Forbidden,
    InvalidRequest,
    MemosError,
    TooLarge,
    UnknownModel,
)

logger = logging.getLogger(__name__)

CHAT_PATH = "/v1/chat/completions"
OWN_PREFIX = "/v1/memcubes"

# A body that must be parsed is held several times over; 64 MiB is far above any honest prompt.
MAX_INSPECTED_BYTES = 64 * 1024 * 1024

# Of VLLM_SERVER_DEV_MODE.
_WEIGHT_ROUTES = frozenset(
    {
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/start_draft_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/weight_checker",
    }
)
_REMOTE_CALL_ROUTE = "/collective_rpc"

TRANSFER_PARAMS_DROPPED = "transfer_params_dropped"
MEMORY_FIELDS_REFUSED = "memory_fields_refused"
OVERSIZED_REFUSED = "oversized_refused"
UNREADABLE_REFUSED = "unreadable_refused"

guard_counters: dict[str, int] = {
    TRANSFER_PARAMS_DROPPED: 0,
    MEMORY_FIELDS_REFUSED: 0,
    OVERSIZED_REFUSED: 0,
    UNREADABLE_REFUSED: 0,
}
"""Events since this process started, by name. Only the event loop writes; metrics read."""

guard_listeners: list[Callable[[str, int], None]] = []
"""Told the name and the increment of each event; must not raise."""

_METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class MemosGuard:
    """Pure ASGI middleware; bodies are buffered whole, as vLLM's own routes do, and replayed."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            scope = await _admit(scope)
        except MemosError as error:
            await _refuse(error, scope, receive, send)
            return
        if scope["type"] != "http" or scope["method"] not in _METHODS_WITH_BODY:
            await self.app(scope, receive, send)
            return
        path = _route_path(scope)
        admin = principal_in(scope).admin
        # Our own bodies never become sampling parameters, and a memory's text or metadata may
        # well hold these words.
        if _is_own(path) or (_is_form(scope) and admin):
            await self.app(scope, receive, send)
            return
        body = await _read_body(receive)
        if body is None:
            return
        try:
            if not admin:
                refuse_adapter_in_headers(scope)
            if _is_form(scope):
                await refuse_adapter_in_form(scope, body, _replay(body, receive))
                guarded = None
            else:
                guarded = _inspect(body, scope, path, admin=admin)
        except MemosError as error:
            await _refuse(error, scope, receive, send)
            return
        if guarded is not None and guarded.text is not None:
            _count_dropped(guarded.dropped)
            body = guarded.text.encode("utf-8", "surrogatepass")
            scope = _with_content_length(scope, len(body))
        await self.app(scope, _replay(body, receive), send)


async def _admit(scope: Scope) -> Scope:
    """Let a request in; the scope that comes back says who sent it.

    Raises:
        Unauthenticated, Unavailable: as `Authenticator.principal`.
        Forbidden: the route is for administrators.
    """
    wanted = audience(_bare_path(scope), scope.get("method"))
    if wanted is Audience.EVERYBODY or _is_allowed_preflight(scope):
        return scope
    principal = await authenticator_of(scope).principal(scope)
    closed = wanted is Audience.ADMINISTRATORS and not principal.admin
    if closed and leads_somewhere(scope):
        raise Forbidden("this route")
    return with_principal(scope, principal)


def _is_allowed_preflight(scope: Scope) -> bool:
    """A browser's question whether it may send a request, which never carries a key.

    vLLM's CORS middleware, behind us, answers it without asking any route; it is let through to
    there only when `--allowed-origins` names somebody.
    """
    if scope["type"] != "http" or scope["method"] != "OPTIONS":
        return False
    names = {name.lower() for name, _ in scope["headers"]}
    args = getattr(scope["app"].state, "args", None)
    return {b"origin", b"access-control-request-method"} <= names and bool(
        getattr(args, "allowed_origins", ())
    )


async def _refuse(error: MemosError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the error; a socket is told before it opens, where its server can do that."""
    denial = "websocket.http.response"
    if scope["type"] == "websocket" and denial not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": ""})
        return
    if isinstance(error, UnknownModel):
        answer = unknown_model_response(error, scope)
    else:
        answer = error_response(error)
    await answer(scope, receive, send)


def _is_own(path: str) -> bool:
    return path == OWN_PREFIX or path.startswith(OWN_PREFIX + "/")


def _inspect(body: bytes, scope: Scope, path: str, *, admin: bool) -> GuardedBody | None:
    """Judge one body; None means that it may pass as it is.

    Args:
        admin: the caller may use adapters of ours by name.

    Raises:
        InvalidRequest: memory fields on a route that does not take them, or unreadable JSON.
        TooLarge: a body that has to be parsed and is over `MAX_INSPECTED_BYTES`.
        Conflict: it would change the model's weights.
        UnknownModel: it names an adapter of ours.
    """
    if path in _WEIGHT_ROUTES or (path == _REMOTE_CALL_ROUTE and b"weights" in body):
        raise Conflict(
            "memory that is stored or in attention was computed with the weights that this server "
            "started with; to serve others, restart it with them"
        )
    takes_memory = path == CHAT_PATH
    adapters = None if admin else ADAPTER_IN_JSON
    if not is_suspect(body, memory_fields=not takes_memory, also=adapters):
        return None
    if len(body) > MAX_INSPECTED_BYTES:
        _count(OVERSIZED_REFUSED)
        raise TooLarge(
            f"the body has {len(body)} bytes and holds fields that must be checked; such a body "
            f"may have at most {MAX_INSPECTED_BYTES} bytes"
        )
    try:
        guarded = guard_body(body)
    except UnreadableBodyError as error:
        if not _says_json(scope):
            return None
        _count(UNREADABLE_REFUSED)
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not admin:
        for model in guarded.models:
            refuse_adapter(model)
    if guarded.memory_fields and not takes_memory:
        _count(MEMORY_FIELDS_REFUSED)
        field = guarded.memory_fields[0]
        raise InvalidRequest(
            f"{path[:200]} does not take '{field}'; send it to POST {CHAT_PATH}", param=field
        )
    return guarded


def _count_dropped(dropped: int) -> None:
    if guard_counters[TRANSFER_PARAMS_DROPPED] == 0:
        logger.warning(
            "a client sent kv_transfer_params; they are removed from every request and counted "
            "(logged once per process)"
        )
    _count(TRANSFER_PARAMS_DROPPED, dropped)


def _count(event: str, increment: int = 1) -> None:
    guard_counters[event] += increment
    for listener in guard_listeners:
        listener(event, increment)


def _bare_path(scope: Scope) -> str:
    """The path that the router will match: without `--root-path`."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(root + "/")):
        path = path[len(root) :]
    return path


def _route_path(scope: Scope) -> str:
    """The same without a trailing slash."""
    return _bare_path(scope).rstrip("/") or "/"


def _content_types(scope: Scope) -> Iterable[bytes]:
    for name, value in scope["headers"]:
        if name.lower() == b"content-type":
            yield value.split(b";", 1)[0].strip().lower()


def _is_form(scope: Scope) -> bool:
    """Every content type must say so: of two headers, a route might read the other one."""
    types = list(_content_types(scope))
    return bool(types) and all(
        kind.startswith(b"multipart/") or kind == b"application/x-www-form-urlencoded"
        for kind in types
    )


def _says_json(scope: Scope) -> bool:
    return any(kind.endswith((b"/json", b"+json")) for kind in _content_types(scope))


async def _read_body(receive: Receive) -> bytes | None:
    """Read the whole body; None when the client went away first."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand the body over once; what follows (a disconnect) comes from the server again."""
    delivered = False

    async def replay() -> Message:
        nonlocal delivered
        if delivered:
            return await receive()
        delivered = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_content_length(scope: Scope, length: int) -> Scope:
    dropped = (b"content-length", b"transfer-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in dropped]
    headers.append((b"content-length", str(length).encode()))
    return {**scope, "headers": headers}
