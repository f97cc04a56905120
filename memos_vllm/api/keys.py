"""Routes of API keys, and of who the caller is."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from pydantic import ConfigDict, Field

from memos_vllm.api import examples, limits
from memos_vllm.api.context import CurrentCall
from memos_vllm.api.replies import ListReply, Reply, render
from memos_vllm.api.route import MemosRoute
from memos_vllm.api.schemas import Input, PageQuery, PathId, Time
from memos_vllm.control.keys import LEASE_SECONDS
from memos_vllm.domain.access import PrincipalKind
from memos_vllm.domain.keys import KeyState, draw_key
from memos_vllm.errors import InvalidRequest

router = APIRouter(route_class=MemosRoute, tags=["keys"])


class KeyInput(Input):
    """POST /v1/keys."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"principal": "alice", "expires_at": "2030-01-31T12:00:00Z"}]
        }
    )

    principal: str = Field(
        description="Whom the key stands for; made if unknown.", json_schema_extra=limits.PRINCIPAL
    )
    admin: bool | None = Field(
        default=None, description="Left out, a new principal is none, but for the first key's."
    )
    kind: Literal["user", "agent", "service"] | None = None
    expires_at: Time | None = None


class KeyReply(Reply):
    id: str
    object: Literal["key"] = "key"
    principal: str
    kind: PrincipalKind
    admin: bool
    prefix: str
    state: KeyState
    created_at: datetime
    created_by: str
    last_used_at: datetime | None = Field(description="To the minute.")
    expires_at: datetime | None
    revoked_at: datetime | None


class NewKeyReply(KeyReply):
    key: str = Field(description="The key itself, this once.")


class PrincipalReply(Reply):
    id: str
    object: Literal["principal"] = "principal"
    kind: PrincipalKind
    admin: bool


@router.post(
    "/v1/keys",
    summary="Make a key",
    status_code=201,
    response_model=NewKeyReply,
    responses=examples.answers(examples.NEW_KEY, 201),
)
async def create_key(call: CurrentCall, body: KeyInput) -> Response:
    """Make a key and show it, this once; administrators only.

    An Idempotency-Key is refused: its answer would have to be kept, and nobody keeps keys.
    """
    if "idempotency-key" in call.request.headers:
        raise InvalidRequest(
            "a new key is not kept to be shown again; send the request without Idempotency-Key",
            param="Idempotency-Key",
        )
    drawn = draw_key()
    key = await call.api.write(
        call.mos.create_key,
        call.actor,
        body.principal,
        drawn.digest,
        admin=body.admin,
        kind=None if body.kind is None else PrincipalKind(body.kind),
        expires_at=body.expires_at,
    )
    if call.actor.kind is PrincipalKind.LOCAL:
        # It was the first: whoever is told so finds every API server closed.
        await asyncio.sleep(LEASE_SECONDS)
    known = KeyReply.model_validate(key)
    reply = render(NewKeyReply(**known.model_dump(), key=drawn.token), status=201)
    reply.headers["Cache-Control"] = "no-store"
    return reply


@router.get(
    "/v1/keys",
    summary="List all keys",
    response_model=ListReply[KeyReply],
    responses=examples.answers(examples.page(examples.KEY), 200),
)
async def list_keys(call: CurrentCall, query: Annotated[PageQuery, Query()]) -> Response:
    """List every key that was ever made, never the keys themselves; administrators only."""

    def read() -> Response:
        page = call.mos.list_keys(call.actor, limit=query.limit, cursor=query.cursor)
        data = [KeyReply.model_validate(key) for key in page.items]
        return render(ListReply[KeyReply](data=data, next_cursor=page.next_cursor))

    return await call.api.read(read)


@router.delete(
    "/v1/keys/{key_id}",
    summary="Revoke a key",
    response_model=KeyReply,
    responses=examples.answers(examples.KEY, 200),
)
async def revoke_key(call: CurrentCall, key_id: PathId) -> Response:
    """Revoke a key by its id or prefix, for good; administrators only.

    Once this is answered no API server lets it in any more; requests that had begun go on. A server
    that cannot reach the catalog learns of it when it can, or refuses the key after a minute.
    """
    key = await call.api.write(call.mos.revoke_key, call.actor, key_id)
    await asyncio.sleep(LEASE_SECONDS)
    return render(KeyReply.model_validate(key))


@router.get(
    "/v1/principals/me",
    summary="Read who you are",
    response_model=PrincipalReply,
    responses=examples.answers(examples.PRINCIPAL, 200),
)
async def read_me(call: CurrentCall) -> Response:
    """Whom the request's key stands for; `local` before there is any key."""
    return render(PrincipalReply.model_validate(call.actor))
