"""Request headers that decide whether a change happens: If-Match and Idempotency-Key."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from typing import Annotated

import anyio
from fastapi import Depends, Header, Request, Response

from memos_vllm.api import limits
from memos_vllm.api.context import Call
from memos_vllm.control.calls import CallKey, asked_under
from memos_vllm.domain.reply import StoredReply
from memos_vllm.errors import InvalidRequest

REPLAYED_HEADER = "Idempotent-Replayed"

_KEEP_SECONDS = 24 * 3600.0
# How long a key stays reserved when the process that answers it dies.
_HOLD_SECONDS = 60.0

_VERSION = re.compile(r'(?:W/)?"?([0-9]{1,18})"?')
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


async def _if_match(
    if_match: Annotated[
        str | None,
        Header(
            description="Version that must still be current; 412 when it is not.",
            json_schema_extra=limits.VERSION,
        ),
    ] = None,
) -> int | None:
    if if_match is None or if_match.strip() == "*":
        return None
    match = _VERSION.fullmatch(if_match.strip())
    if match is None:
        raise InvalidRequest(
            "If-Match must be the version number of the object, such as: If-Match: 12",
            param="If-Match",
        )
    return int(match.group(1))


IfMatch = Annotated[int | None, Depends(_if_match)]


async def _documented(
    _: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="The same key and body give the same answer once; another body gives 409.",
            json_schema_extra=limits.KEY,
        ),
    ] = None,
) -> None:
    """Shows the header on the OpenAPI page; `_key` reads it."""


TAKES_KEY = [Depends(_documented)]
"""The dependencies of routes that answer once."""


async def answer_once(
    call: Call, act: Callable[[], Response], *, body: bytes | None = None
) -> Response:
    """Run `act`, or repeat the answer that its Idempotency-Key got the first time.

    Only success is kept: a refused request changed nothing and may be sent again.

    Args:
        act: makes one change of the catalog and renders its result; runs in a worker thread.
            The change and its result are committed together.
        body: what the request says, where equal requests may differ in their bytes.
    Raises:
        Conflict: the key was used with another method, path or body.
    """
    key = _key(call)
    if key is None:
        return await call.api.write(act)
    sent = await call.request.body() if body is None else body
    fingerprint = await call.api.read(_fingerprint, call.request, sent)

    named = CallKey(call.actor.id, key, fingerprint, _KEEP_SECONDS)

    def answer() -> Response:
        with asked_under(named) as asked:
            response = act()
        if asked.repeated:
            response.headers[REPLAYED_HEADER] = "true"
        return response

    return await call.api.write(answer)


async def answer_job_once(
    call: Call,
    act: Callable[[], Awaitable[Response]],
    *,
    takes_seconds: float,
    body: bytes | None = None,
) -> Response:
    """As `answer_once`, for an `act` that starts a job and may wait for its end.

    Requests with one key wait for each other; at another API server of the same catalog they get
    a 409 until the answer is there. After a crash in between, the same request may start a second
    job, which finds the work done.

    Args:
        takes_seconds: how long `act` may wait, on top of its own work.
        body: as of `answer_once`.
    """
    key = _key(call)
    if key is None:
        return await act()
    sent = await call.request.body() if body is None else body
    fingerprint = await call.api.read(_fingerprint, call.request, sent)
    async with call.api.locks.hold((call.actor.id, key)):
        stored = await call.api.write(
            call.mos.reserve_reply,
            call.actor,
            key,
            fingerprint,
            hold_seconds=_HOLD_SECONDS + takes_seconds,
        )
        if stored is not None:
            return _repeated(stored)
        return await _act_and_store(call, act, key=key, fingerprint=fingerprint)


def _key(call: Call) -> str | None:
    key = call.request.headers.get("idempotency-key")
    if key is not None and _KEY.fullmatch(key) is None:
        raise InvalidRequest(
            "Idempotency-Key must be 1 to 255 printable ASCII characters without spaces",
            param="Idempotency-Key",
        )
    return key


def _repeated(reply: StoredReply) -> Response:
    return Response(
        reply.body,
        status_code=reply.status,
        headers={REPLAYED_HEADER: "true"},
        media_type="application/json",
    )


async def _act_and_store(
    call: Call, act: Callable[[], Awaitable[Response]], *, key: str, fingerprint: str
) -> Response:
    try:
        response = await act()
    except BaseException:
        with anyio.CancelScope(shield=True):
            await call.api.write(call.mos.release_reply, call.actor, key)
        raise
    await call.api.write(
        call.mos.store_reply,
        call.actor,
        key,
        fingerprint,
        response.status_code,
        bytes(response.body),
    )
    return response


def _fingerprint(request: Request, body: bytes) -> str:
    """A digest of what was asked; spaces and the order of members do not make another body."""
    # A route without a body of its own takes any bytes; those are compared as they are.
    with contextlib.suppress(ValueError, RecursionError):
        body = json.dumps(json.loads(body), sort_keys=True).encode()
    target = f"{request.method} {request.url.path}?{request.url.query}\n"
    return hashlib.sha256(target.encode("utf-8", "surrogatepass") + body).hexdigest()
