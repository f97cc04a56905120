"""Routes of grants: share a cube, take it back, and see who has it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from pydantic import ConfigDict, Field

from memos_vllm.api import examples, limits
from memos_vllm.api.context import CurrentCall
from memos_vllm.api.replies import DeletedReply, ListReply, Reply, render
from memos_vllm.api.route import MemosRoute
from memos_vllm.api.schemas import Input, PageQuery, PathId
from memos_vllm.domain.access import Role

router = APIRouter(route_class=MemosRoute, tags=["grants"])

_ONE = "/v1/memcubes/{cube_id}/grants/{principal}"


class GrantInput(Input):
    """PUT of a grant."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"role": "editor", "labels": ["finance"]}]}
    )

    role: Annotated[Role, Field(strict=False)]
    labels: list[str] = Field(
        default=[],
        description="Labels whose memories a reader or editor may see and set.",
        json_schema_extra=limits.WORDS,
    )


class GrantReply(Reply):
    object: Literal["grant"] = "grant"
    cube_id: str
    principal: str
    role: Role
    labels: list[str]
    granted_by: str
    granted_at: datetime


@router.put(
    _ONE,
    summary="Share a cube",
    response_model=GrantReply,
    responses=examples.answers(examples.GRANT, 200),
)
async def put_grant(
    call: CurrentCall, cube_id: PathId, principal: PathId, body: GrantInput
) -> Response:
    """Give a principal a role, in the place of the one it had. For the cube's owners.

    It need not have a key yet. Takes effect with the principal's next request.
    """

    def put() -> Response:
        grant = call.mos.put_grant(
            call.actor, cube_id, principal, role=body.role, labels=body.labels
        )
        return render(GrantReply.model_validate(grant))

    return await call.api.write(put)


@router.delete(
    _ONE,
    summary="Take a cube back",
    response_model=DeletedReply,
    responses=examples.answers({"id": "ann", "object": "grant", "deleted": True}, 200),
)
async def delete_grant(call: CurrentCall, cube_id: PathId, principal: PathId) -> Response:
    """Remove a principal's grant, from its next request on. The last owner stays: 409."""
    await call.api.write(call.mos.delete_grant, call.actor, cube_id, principal)
    return render(DeletedReply(id=principal, object="grant"))


@router.get(
    "/v1/memcubes/{cube_id}/grants",
    summary="List a cube's grants",
    response_model=ListReply[GrantReply],
    responses=examples.answers(examples.page(examples.GRANT), 200),
)
async def list_grants(
    call: CurrentCall, cube_id: PathId, query: Annotated[PageQuery, Query()]
) -> Response:
    """Who may do what: all of it for owners, the caller's own grant for others."""

    def read() -> Response:
        page = call.mos.list_grants(call.actor, cube_id, limit=query.limit, cursor=query.cursor)
        data = [GrantReply.model_validate(grant) for grant in page.items]
        return render(ListReply[GrantReply](data=data, next_cursor=page.next_cursor))

    return await call.api.read(read)
