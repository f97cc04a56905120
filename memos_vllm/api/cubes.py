"""Routes of cubes: create, list, read, change, delete, and their numbers."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from memos_vllm.api import examples
from memos_vllm.api.conditions import TAKES_KEY, IfMatch, answer_once
from memos_vllm.api.context import Call, CurrentCall
from memos_vllm.api.replies import (
    CubeReply,
    DeletedReply,
    ListReply,
    StatsReply,
    render,
)
from memos_vllm.api.route import MemosRoute
from memos_vllm.api.schemas import CubeInput, CubePatchInput, PageQuery, PathId
from memos_vllm.domain.cube import Cube, CubePatch
from memos_vllm.errors import Unavailable

router = APIRouter(route_class=MemosRoute, tags=["memcubes"])


def _resident_tokens(call: Call, cube_id: str) -> int:
    try:
        return call.gateway.resident_tokens(cube_id)
    except Unavailable:
        # The catalog can be read and edited while the engine is still loading its weights.
        return 0


def cube_reply(call: Call, cube: Cube) -> CubeReply:
    """A cube with what the engine holds of it."""
    reply = CubeReply.model_validate(cube)
    # KV of what was demoted or edited stays in the pool for a while and is of no use any more.
    resident = _resident_tokens(call, cube.id)
    reply.activation.resident_tokens = min(resident, reply.activation.tokens)
    return reply


@router.post(
    "/v1/memcubes",
    summary="Create a cube",
    status_code=201,
    response_model=CubeReply,
    responses=examples.answers(examples.CUBE, 201),
    dependencies=TAKES_KEY,
)
async def create_cube(call: CurrentCall, body: CubeInput | None = None) -> Response:
    """Create an empty cube. Without `id` the server chooses one."""
    cube = body or CubeInput()

    def create() -> Response:
        created = call.mos.create_cube(
            call.actor,
            cube_id=cube.id,
            name=cube.name,
            description=cube.description,
            preamble=cube.preamble,
            labels=cube.labels,
        )
        return render(cube_reply(call, created), status=201)

    return await answer_once(call, create)


@router.get(
    "/v1/memcubes",
    summary="List cubes",
    response_model=ListReply[CubeReply],
    responses=examples.answers(examples.page(examples.CUBE), 200),
)
async def list_cubes(call: CurrentCall, query: Annotated[PageQuery, Query()]) -> Response:
    """List the cubes that the caller may read."""

    def read() -> Response:
        page = call.mos.list_cubes(call.actor, limit=query.limit, cursor=query.cursor)
        data = [cube_reply(call, cube) for cube in page.items]
        return render(ListReply[CubeReply](data=data, next_cursor=page.next_cursor))

    return await call.api.read(read)


@router.get(
    "/v1/memcubes/{cube_id}",
    summary="Read a cube",
    response_model=CubeReply,
    responses=examples.answers(examples.CUBE, 200),
)
async def get_cube(call: CurrentCall, cube_id: PathId) -> Response:
    """Read one cube."""
    return await call.api.read(
        lambda: render(cube_reply(call, call.mos.get_cube(call.actor, cube_id)))
    )


@router.patch(
    "/v1/memcubes/{cube_id}",
    summary="Change a cube",
    response_model=CubeReply,
    responses=examples.answers(examples.CUBE, 200),
)
async def update_cube(
    call: CurrentCall, cube_id: PathId, body: CubePatchInput, if_match: IfMatch
) -> Response:
    """Change the fields that are sent. A new preamble makes activation memory stale."""
    patch = CubePatch(**body.changes())

    def change() -> Response:
        cube = call.mos.update_cube(call.actor, cube_id, patch, if_match=if_match)
        return render(cube_reply(call, cube))

    return await call.api.write(change)


@router.delete(
    "/v1/memcubes/{cube_id}",
    summary="Delete a cube",
    response_model=DeletedReply,
    responses=examples.answers(
        {"id": "acme-support", "object": "memcube", "deleted": True, "artifacts_removed": 1}, 200
    ),
)
async def delete_cube(call: CurrentCall, cube_id: PathId, if_match: IfMatch) -> Response:
    """Delete a cube with its memories and everything that was compiled from it."""
    # Asked for first: a server without its store must refuse, not leave the files behind.
    gateway = call.gateway
    deleted = await call.api.write(call.mos.delete_cube, call.actor, cube_id, if_match=if_match)
    await gateway.discard_artifacts(deleted.artifacts)
    return render(
        DeletedReply(id=deleted.id, object="memcube", artifacts_removed=len(deleted.artifacts))
    )


@router.get(
    "/v1/memcubes/{cube_id}/stats",
    summary="Read a cube's numbers",
    response_model=StatsReply,
    responses=examples.answers(examples.STATS, 200),
)
async def cube_stats(call: CurrentCall, cube_id: PathId) -> Response:
    """Counts, tokens and bytes per tier, hits, prefill tokens and seconds saved."""

    def read() -> Response:
        reply = StatsReply.model_validate(call.mos.cube_stats(call.actor, cube_id))
        reply.resident_tokens = _resident_tokens(call, cube_id)
        return render(reply)

    return await call.api.read(read)
