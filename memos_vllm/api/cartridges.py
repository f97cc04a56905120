"""Routes of whole cubes: export, import, clone, move, diff."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterable
from typing import Annotated

import anyio
from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import ConfigDict, Field

from memos_vllm.api import examples, limits
from memos_vllm.api.archives import ReceivedArchive, check, pack, receive
from memos_vllm.api.conditions import TAKES_KEY, IfMatch, answer_job_once, answer_once
from memos_vllm.api.context import Call, CurrentCall
from memos_vllm.api.cubes import cube_reply
from memos_vllm.api.replies import CubeReply, ListReply, MemoryReply, Reply, render
from memos_vllm.api.route import MemosRoute, StreamRoute
from memos_vllm.api.schemas import Input, PageQuery, PathId
from memos_vllm.api.threads import Threads
from memos_vllm.cartridge.artifacts import CarriedArtifact
from memos_vllm.cartridge.layout import Part
from memos_vllm.domain.cartridge import Difference, LoadedCube
from memos_vllm.domain.cube import validate_cube_id
from memos_vllm.errors import InvalidRequest

router = APIRouter(route_class=MemosRoute, tags=["memcubes"])
streamed = APIRouter(route_class=StreamRoute, tags=["memcubes"])

ARCHIVE_TYPE = "application/zstd"
_TIERS = ("plaintext", "activation", "parametric")
# Longer than a store takes to write what an archive holds.
_HOLD_SECONDS = 600.0
_MAX_WAITING = 16
# Compressing and hashing take a core each, which the engine would miss.
_PACKERS = Threads(
    2,
    waiting=_MAX_WAITING,
    refusal=f"{_MAX_WAITING} archives are waiting to be packed or read already; try again",
)


class CloneInput(Input):
    """POST /v1/memcubes/{id}/clone."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"id": "acme-copy", "name": "A copy of Acme"}]}
    )

    id: str = Field(description="Of the copy.", json_schema_extra=limits.CUBE_ID)
    name: str | None = Field(
        default=None,
        description="The original's when it is left out.",
        json_schema_extra=limits.NAME,
    )


class MoveInput(Input):
    """POST /v1/memcubes/{id}/move."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"owner": "alice"}]})

    owner: str = Field(description="Id of a principal.", json_schema_extra=limits.PRINCIPAL)


class DiffQuery(PageQuery):
    with_: str = Field(alias="with", description="The other cube.", max_length=256)


class LoadedCubeReply(CubeReply):
    origin: str = Field(description="The cube's id where it came from.")
    ids_mapped: int = Field(description="How many memories have new ids: all of them or none.")
    memory_ids: dict[str, str] = Field(
        description="Former and new ids, of the first 1,000 memories when they were mapped."
    )
    warnings: list[str] = Field(description="What was not taken over, and why.")


class DifferenceReply(Reply):
    kind: Difference
    here: MemoryReply | None
    there: MemoryReply | None
    fields: list[str]


@router.get(
    "/v1/memcubes/{cube_id}/export",
    summary="Export a cube",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {
                ARCHIVE_TYPE: {
                    "schema": {"type": "string", "format": "binary"},
                    "example": "(a .memcube archive)",
                }
            }
        }
    },
)
async def export_cube(
    call: CurrentCall,
    cube_id: PathId,
    include: Annotated[
        str,
        Query(
            description="Tiers, with commas. Plaintext is always there: all else is built from it."
        ),
    ] = ",".join(_TIERS),
) -> Response:
    """The cube as one file: memories with their history, edges, lineage, documents, conversations,
    vectors, and artifacts. What the caller may not see is left out."""
    tiers = _tiers(include)
    support = call.gateway.cartridges
    # Nobody is told of a cube that they may not read, not even by a full queue.
    await call.api.read(call.mos.get_cube, call.actor, cube_id)
    manifest, packed = await _PACKERS.run(
        pack, call.mos, call.actor, cube_id, include=tiers, support=support
    )
    await call.api.write(
        call.mos.note_export,
        call.actor,
        cube_id,
        memories=manifest.counts[Part.MEMORIES],
        whole=manifest.whole,
    )
    name = f'attachment; filename="{manifest.cube.id}.memcube"'
    return StreamingResponse(packed, media_type=ARCHIVE_TYPE, headers={"Content-Disposition": name})


@streamed.post(
    "/v1/memcubes/import",
    summary="Import a cube",
    status_code=201,
    response_model=LoadedCubeReply,
    responses=examples.answers(examples.LOADED_CUBE, 201),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {ARCHIVE_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
    dependencies=TAKES_KEY,
)
async def import_cube(
    call: CurrentCall,
    cube_id: Annotated[
        str | None,
        Query(
            alias="id",
            description="In place of the id in the archive.",
            json_schema_extra=limits.CUBE_ID,
        ),
    ] = None,
    trust_artifacts: Annotated[
        bool,
        Query(description="Take over KV and vectors; otherwise they are computed from the text."),
    ] = True,
    replace: Annotated[
        bool,
        Query(description="Take the place of the cube that has the id, with its owner and grants."),
    ] = False,
) -> Response:
    """Make a cube of an archive, which is the body: all of it or nothing. It belongs to the caller.

    With `replace=true` it takes the place of the cube that has the id, at one moment: chats see
    either the one or the other.

    Memories keep their ids, unless the cube gets another id or one of theirs is in use. Artifacts
    of another model or numerics class are kept out, with a warning, and computed anew.
    """
    if cube_id is not None:
        validate_cube_id(cube_id)
    support = call.gateway.cartridges
    with tempfile.TemporaryFile(dir=support.spool_dir) as file:
        digest = await receive(call.request, file, max_bytes=support.max_import_bytes)
        archive = await _PACKERS.run(check, file, digest)

        async def act() -> Response:
            loaded = await _load(call, archive, cube_id, trusted=trust_artifacts, replace=replace)
            await call.gateway.discard_artifacts(loaded.replaced)
            artifacts = archive.artifacts() if trust_artifacts else ()
            warnings = []
            if archive.manifest.artifacts and not trust_artifacts:
                warnings.append("the archive's artifacts were left out, as asked")
            return await _finish(call, loaded, artifacts, warnings)

        return await answer_job_once(
            call, act, takes_seconds=_HOLD_SECONDS, body=f"blake3:{digest}".encode()
        )


async def _load(
    call: Call, archive: ReceivedArchive, cube_id: str | None, *, trusted: bool, replace: bool
) -> LoadedCube:
    import_id = secrets.token_hex(16)
    try:
        chunks = await _PACKERS.run(archive.stage, call.mos, import_id, vectors=trusted)
        return await call.api.write(
            call.mos.import_cube,
            call.actor,
            import_id,
            archive.manifest.cube,
            chunks=chunks,
            archive_digest=archive.digest,
            cube_id=cube_id,
            replace=replace,
            trusted=trusted,
            hold_seconds=_HOLD_SECONDS,
        )
    except BaseException:
        # What this leaves behind, because the catalog is down, is swept later.
        with anyio.CancelScope(shield=True):
            await call.api.write(call.mos.discard_import, import_id)
        raise


async def _finish(
    call: Call, loaded: LoadedCube, artifacts: Iterable[CarriedArtifact], warnings: list[str]
) -> Response:
    """Bring the artifacts, and answer with the cube as it is then."""
    warnings += await call.gateway.cartridges.adopt_artifacts(loaded, artifacts)

    def answer() -> Response:
        cube = cube_reply(call, call.mos.get_cube(call.actor, loaded.cube.id))
        reply = LoadedCubeReply(
            **dict(cube),
            origin=loaded.origin,
            ids_mapped=loaded.mapped,
            memory_ids=dict(loaded.memory_ids),
            warnings=warnings,
        )
        return render(reply, status=201)

    return await call.api.read(answer)


@router.post(
    "/v1/memcubes/{cube_id}/clone",
    summary="Clone a cube",
    status_code=201,
    response_model=LoadedCubeReply,
    responses=examples.answers(examples.LOADED_CUBE, 201),
    dependencies=TAKES_KEY,
)
async def clone_cube(call: CurrentCall, cube_id: PathId, body: CloneInput) -> Response:
    """Copy what the caller sees of a cube, history and artifacts included. It belongs to the
    caller."""

    async def act() -> Response:
        cartridges = call.gateway.cartridges
        loaded = await call.api.write(
            call.mos.clone_cube,
            call.actor,
            cube_id,
            body.id,
            name=body.name,
            hold_seconds=_HOLD_SECONDS,
        )
        artifacts = await call.api.read(cartridges.open_artifacts, cube_id)
        return await _finish(call, loaded, artifacts, [])

    return await answer_job_once(call, act, takes_seconds=_HOLD_SECONDS)


@router.post(
    "/v1/memcubes/{cube_id}/move",
    summary="Hand a cube over to another owner",
    response_model=CubeReply,
    responses=examples.answers(examples.CUBE, 200),
    dependencies=TAKES_KEY,
)
async def move_cube(
    call: CurrentCall, cube_id: PathId, body: MoveInput, if_match: IfMatch
) -> Response:
    """Make another principal the owner; the former one keeps what a grant gives them, if any."""

    def move() -> Response:
        cube = call.mos.move_cube(call.actor, cube_id, body.owner, if_match=if_match)
        return render(cube_reply(call, cube))

    return await answer_once(call, move)


@router.get(
    "/v1/memcubes/{cube_id}/diff",
    summary="Compare two cubes",
    response_model=ListReply[DifferenceReply],
    responses=examples.answers(examples.page(examples.DIFFERENCE), 200),
)
async def diff_cubes(
    call: CurrentCall, cube_id: PathId, query: Annotated[DiffQuery, Query()]
) -> Response:
    """Memories that only one of two cubes has, and those that were changed in one of them.

    A page may hold fewer than `limit` without being the last.
    """

    def read() -> Response:
        page = call.mos.diff_cubes(
            call.actor, cube_id, query.with_, limit=query.limit, cursor=query.cursor
        )
        data = [DifferenceReply.model_validate(difference) for difference in page.items]
        return render(ListReply[DifferenceReply](data=data, next_cursor=page.next_cursor))

    return await call.api.read(read)


def _tiers(include: str) -> tuple[str, ...]:
    """The tiers asked for, in a fixed order.

    Raises:
        InvalidRequest: one is none.
    """
    asked = {word.strip() for word in include.split(",") if word.strip()}
    if unknown := asked - set(_TIERS):
        raise InvalidRequest(
            f"include names {len(unknown)} that are no tiers; it takes {', '.join(_TIERS)}",
            param="include",
        )
    return tuple(tier for tier in _TIERS if tier in asked or tier == "plaintext")
