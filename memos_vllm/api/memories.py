"""Routes of memories: add, list, read, change, archive, restore, erase, history."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from memos_vllm.api import examples
from memos_vllm.api.conditions import TAKES_KEY, IfMatch, answer_once
from memos_vllm.api.context import Call, CurrentCall
from memos_vllm.api.replies import (
    ErasedReply,
    ListReply,
    MemoryReply,
    MemoryVersionReply,
    render,
)
from memos_vllm.api.route import MemosRoute
from memos_vllm.api.schemas import (
    EraseQuery,
    KeepInput,
    MemoriesInput,
    MemoriesQuery,
    MemoryPatchInput,
    MergeInput,
    PathId,
)
from memos_vllm.domain.memory import Memory

router = APIRouter(route_class=MemosRoute, tags=["memories"])

_COLLECTION = "/v1/memcubes/{cube_id}/memories"
_ONE = "/v1/memcubes/{cube_id}/memories/{memory_id}"


def _render(memory: Memory) -> Response:
    return render(MemoryReply.model_validate(memory))


@router.post(
    _COLLECTION,
    summary="Add memories",
    status_code=201,
    response_model=ListReply[MemoryReply],
    responses=examples.answers(examples.page(examples.MEMORY), 201),
    dependencies=TAKES_KEY,
)
async def add_memories(call: CurrentCall, cube_id: PathId, body: MemoriesInput) -> Response:
    """Add up to 1,000 memories in one transaction: all of them, or none."""

    def add() -> Response:
        memories = [memory.to_domain() for memory in body.memories]
        added = call.mos.add_memories(call.actor, cube_id, memories, reason=body.reason)
        data = [MemoryReply.model_validate(memory) for memory in added]
        return render(ListReply[MemoryReply](data=data), status=201)

    return await answer_once(call, add)


@router.get(
    _COLLECTION,
    summary="List memories",
    response_model=ListReply[MemoryReply],
    responses=examples.answers(examples.page(examples.MEMORY), 200),
)
async def list_memories(
    call: CurrentCall, cube_id: PathId, query: Annotated[MemoriesQuery, Query()]
) -> Response:
    """List memories, filtered by state, tier, tag or words in the text."""

    def read() -> Response:
        page = call.mos.list_memories(
            call.actor,
            cube_id,
            state=query.state,
            tier=query.tier,
            tag=query.tag,
            query=query.q,
            limit=query.limit,
            cursor=query.cursor,
        )
        data = [MemoryReply.model_validate(memory) for memory in page.items]
        return render(ListReply[MemoryReply](data=data, next_cursor=page.next_cursor))

    return await call.api.read(read)


@router.get(
    _ONE,
    summary="Read a memory",
    response_model=MemoryReply,
    responses=examples.answers(examples.MEMORY, 200),
)
async def get_memory(call: CurrentCall, cube_id: PathId, memory_id: PathId) -> Response:
    """Read one memory."""
    return await call.api.read(lambda: _render(call.mos.get_memory(call.actor, cube_id, memory_id)))


@router.patch(
    _ONE,
    summary="Change a memory",
    response_model=MemoryReply,
    responses=examples.answers(examples.MEMORY, 200),
)
async def update_memory(
    call: CurrentCall,
    cube_id: PathId,
    memory_id: PathId,
    body: MemoryPatchInput,
    if_match: IfMatch,
) -> Response:
    """Make a new version with the fields that are sent; artifacts that hold it become stale."""

    def change() -> Response:
        patch = body.to_domain()
        return _render(
            call.mos.update_memory(call.actor, cube_id, memory_id, patch, if_match=if_match)
        )

    return await call.api.write(change)


@router.delete(
    _ONE,
    summary="Archive or erase a memory",
    response_model=MemoryReply | ErasedReply,
    responses=examples.answers(examples.MEMORY, 200),
)
async def delete_memory(
    call: CurrentCall,
    cube_id: PathId,
    memory_id: PathId,
    query: Annotated[EraseQuery, Query()],
    if_match: IfMatch,
) -> Response:
    """Archive a memory; with `erase=true` remove its text, its versions and all KV built from it.

    The text is gone once this is answered. The job that the answer names removes what it led to
    elsewhere, such as freed space in files, and lists how it knows that each is gone. What stays of
    an erased memory is an audit row with a keyed hash of the text.
    """
    if query.erase:
        return await _erase(call, cube_id, memory_id, if_match=if_match)
    return await call.api.write(
        lambda: _render(call.mos.archive_memory(call.actor, cube_id, memory_id, if_match=if_match))
    )


async def _erase(call: Call, cube_id: str, memory_id: str, *, if_match: int | None) -> Response:
    # Asked for first: a server without its store must refuse, not leave the files behind.
    gateway = call.gateway
    erased = await call.api.write(
        call.mos.erase_memory,
        call.actor,
        cube_id,
        memory_id,
        if_match=if_match,
        tombstone_key=call.api.tombstone_key(),
    )
    await gateway.discard_artifacts(erased.artifacts)
    gateway.wake_jobs()
    return render(
        ErasedReply(
            id=erased.id,
            object="memory",
            cube_id=erased.cube_id,
            versions_removed=erased.versions,
            derived=list(erased.derived),
            # Those of other cubes, where it was derived from, are not the caller's to know.
            artifacts_removed=sum(record.cube_id == cube_id for record in erased.artifacts),
            job_id=erased.job,
        )
    )


@router.post(
    "/v1/memcubes/{cube_id}/merge",
    summary="Merge memories",
    status_code=201,
    response_model=MemoryReply,
    responses=examples.answers(examples.MEMORY, 201),
    dependencies=TAKES_KEY,
)
async def merge_memories(call: CurrentCall, cube_id: PathId, body: MergeInput) -> Response:
    """Put one new memory in the place of several, which become `merged`, with lineage both ways."""

    def merge() -> Response:
        new = call.mos.merge_memories(
            call.actor, cube_id, body.memory_ids, text=body.text, reason=body.reason
        )
        return render(MemoryReply.model_validate(new), status=201)

    return await answer_once(call, merge)


@router.post(
    "/v1/memcubes/{cube_id}/keep",
    summary="Keep memories of another cube",
    status_code=201,
    response_model=ListReply[MemoryReply],
    responses=examples.answers(examples.page(examples.MEMORY), 201),
    dependencies=TAKES_KEY,
)
async def keep_memories(call: CurrentCall, cube_id: PathId, body: KeepInput) -> Response:
    """Take memories over from another cube, such as a session's, with lineage.

    What this cube says already, word for word, is not added again. Erasing the origin erases what
    was kept of it.
    """

    def keep() -> Response:
        kept = call.mos.keep_memories(
            call.actor,
            cube_id,
            from_cube=body.from_,
            memory_ids=body.selected,
            reason=body.reason,
        )
        data = [MemoryReply.model_validate(memory) for memory in kept]
        return render(ListReply[MemoryReply](data=data), status=201)

    return await answer_once(call, keep)


@router.post(
    _ONE + "/archive",
    summary="Archive a memory",
    response_model=MemoryReply,
    responses=examples.answers(examples.MEMORY, 200),
    dependencies=TAKES_KEY,
)
async def archive_memory(
    call: CurrentCall, cube_id: PathId, memory_id: PathId, if_match: IfMatch
) -> Response:
    """Take a memory out of use; its text and history stay."""

    def archive() -> Response:
        return _render(call.mos.archive_memory(call.actor, cube_id, memory_id, if_match=if_match))

    return await answer_once(call, archive)


@router.post(
    _ONE + "/restore",
    summary="Restore a memory",
    response_model=MemoryReply,
    responses=examples.answers(examples.MEMORY, 200),
    dependencies=TAKES_KEY,
)
async def restore_memory(
    call: CurrentCall, cube_id: PathId, memory_id: PathId, if_match: IfMatch
) -> Response:
    """Bring an archived memory back into the plaintext tier."""

    def restore() -> Response:
        return _render(call.mos.restore_memory(call.actor, cube_id, memory_id, if_match=if_match))

    return await answer_once(call, restore)


@router.get(
    _ONE + "/history",
    summary="Read a memory's history",
    response_model=ListReply[MemoryVersionReply],
    responses=examples.answers(examples.page(examples.MEMORY_VERSION), 200),
)
async def memory_history(call: CurrentCall, cube_id: PathId, memory_id: PathId) -> Response:
    """Every version with who made it, when, why, and from what."""

    def read() -> Response:
        versions = call.mos.memory_history(call.actor, cube_id, memory_id)
        data = [MemoryVersionReply.model_validate(version) for version in versions]
        return render(ListReply[MemoryVersionReply](data=data))

    return await call.api.read(read)
