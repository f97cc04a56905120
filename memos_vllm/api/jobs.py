"""Routes that move memories between tiers, and those of the jobs that do it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from time import monotonic
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from memos_vllm.api import examples
from memos_vllm.api.conditions import TAKES_KEY, answer_job_once
from memos_vllm.api.context import Call, CurrentCall
from memos_vllm.api.error_table import describe_error
from memos_vllm.api.replies import JobReply, ListReply, render
from memos_vllm.api.route import MemosRoute
from memos_vllm.api.schemas import DemoteInput, PageQuery, PathId, PromoteInput, WaitQuery
from memos_vllm.domain.job import Job
from memos_vllm.domain.memory import Tier
from memos_vllm.errors import MemosError

router = APIRouter(route_class=MemosRoute, tags=["jobs"])

# A bake takes from tens of milliseconds to minutes, and a look at a job half a millisecond.
_FIRST_POLL_SECONDS = 0.02
_SLOWEST_POLL_SECONDS = 0.25
# Proxies close streams that are silent for 30 to 60 seconds.
_KEEPALIVE_SECONDS = 15.0

_ACCEPTED = examples.answers(examples.JOB, 200, 202)


@router.post(
    "/v1/memcubes/{cube_id}/promote",
    summary="Promote memories to a hotter tier",
    status_code=202,
    response_model=JobReply,
    responses=_ACCEPTED,
    dependencies=TAKES_KEY,
)
async def promote(call: CurrentCall, cube_id: PathId, body: PromoteInput) -> Response:
    """Start a job that compiles the memories; 202 with the job, or 200 when waited for."""

    async def act() -> Response:
        if body.tier is Tier.ACTIVATION:
            # Who may not is told so before the engine is asked, which measures what is there.
            await call.api.read(call.mos.require_writable, call.actor, cube_id)
            await call.gateway.check_composition(cube_id, adding=body.selected)
        job = await call.api.write(
            call.mos.promote, call.actor, cube_id, to=body.tier, memory_ids=body.selected
        )
        return await _settle(call, job, wait_seconds=body.wait_seconds)

    return await answer_job_once(call, act, takes_seconds=body.wait_seconds)


@router.post(
    "/v1/memcubes/{cube_id}/demote",
    summary="Demote memories to the plaintext tier",
    status_code=202,
    response_model=JobReply,
    responses=_ACCEPTED,
    dependencies=TAKES_KEY,
)
async def demote(call: CurrentCall, cube_id: PathId, body: DemoteInput) -> Response:
    """Start a job that takes the memories out; 202 with the job, or 200 when waited for."""

    async def act() -> Response:
        job = await call.api.write(
            call.mos.demote, call.actor, cube_id, from_tier=body.tier, memory_ids=body.selected
        )
        return await _settle(call, job, wait_seconds=body.wait_seconds)

    return await answer_job_once(call, act, takes_seconds=body.wait_seconds)


@router.post(
    "/v1/memcubes/{cube_id}/reindex",
    summary="Index a cube's memories anew",
    status_code=202,
    response_model=JobReply,
    responses=_ACCEPTED,
    dependencies=TAKES_KEY,
)
async def reindex(
    call: CurrentCall, cube_id: PathId, query: Annotated[WaitQuery, Query()]
) -> Response:
    """Drop the cube from the search index and take in each memory again; texts are untouched.

    For an index that lags or was restored from a backup. Vectors are not computed anew.
    """

    async def act() -> Response:
        job = await call.api.write(call.mos.queue_reindex, call.actor, cube_id)
        return await _settle(call, job, wait_seconds=query.wait)

    return await answer_job_once(call, act, takes_seconds=query.wait)


@router.get(
    "/v1/memcubes/{cube_id}/jobs",
    summary="List a cube's jobs",
    response_model=ListReply[JobReply],
    responses=examples.answers(examples.page(examples.JOB), 200),
)
async def list_jobs(
    call: CurrentCall, cube_id: PathId, query: Annotated[PageQuery, Query()]
) -> Response:
    """List the jobs of a cube."""

    def read() -> Response:
        page = call.mos.list_jobs(
            call.actor, cube_id=cube_id, limit=query.limit, cursor=query.cursor
        )
        data = [JobReply.model_validate(job) for job in page.items]
        return render(ListReply[JobReply](data=data, next_cursor=page.next_cursor))

    return await call.api.read(read)


@router.get(
    "/v1/jobs/{job_id}",
    summary="Read a job",
    response_model=JobReply,
    responses=examples.answers(examples.JOB, 200),
)
async def get_job(call: CurrentCall, job_id: PathId) -> Response:
    """Read one job."""
    return _render(await _read(call, job_id))


@router.delete(
    "/v1/jobs/{job_id}",
    summary="Cancel a job",
    response_model=JobReply,
    responses=examples.answers({**examples.JOB, "state": "cancelled"}, 200),
)
async def cancel_job(call: CurrentCall, job_id: PathId) -> Response:
    """Cancel a job that has not finished."""
    return _render(await call.api.write(call.mos.cancel_job, call.actor, job_id))


@router.get(
    "/v1/jobs/{job_id}/events",
    summary="Follow a job",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"example": examples.EVENTS}}}},
)
async def job_events(call: CurrentCall, job_id: PathId) -> Response:
    """Server-sent events: `progress` with the job at each change, then `done` and the end."""
    job = await _read(call, job_id)
    return StreamingResponse(
        _events(call, job),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def _render(job: Job, *, status: int = 200) -> Response:
    return render(JobReply.model_validate(job), status=status)


async def _read(call: Call, job_id: str) -> Job:
    return await call.api.read(call.mos.get_job, call.actor, job_id)


async def _settle(call: Call, job: Job, *, wait_seconds: float) -> Response:
    """Wake the worker and answer: 200 if the caller waited and the job is done, else 202."""
    if not job.state.finished:
        call.gateway.wake_jobs()
    if wait_seconds == 0:
        return _render(job, status=202)
    job = await _wait(call, job, wait_seconds=wait_seconds)
    return _render(job, status=200 if job.state.finished else 202)


async def _wait(call: Call, job: Job, *, wait_seconds: float) -> Job:
    """Look at the job until it is finished, the time is up or the caller has gone."""
    deadline, pause = monotonic() + wait_seconds, _FIRST_POLL_SECONDS
    while not job.state.finished:
        remaining = deadline - monotonic()
        if remaining <= 0 or await call.request.is_disconnected():
            break
        await asyncio.sleep(min(pause, remaining))
        pause = min(pause * 1.5, _SLOWEST_POLL_SECONDS)
        job = await _read(call, job.id)
    return job


async def _events(call: Call, job: Job) -> AsyncIterator[str]:
    yield _event("progress", job)
    pause, silent_since = _FIRST_POLL_SECONDS, monotonic()
    while not job.state.finished:
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _SLOWEST_POLL_SECONDS)
        try:
            latest = await _read(call, job.id)
        except MemosError as error:
            # The cube was deleted meanwhile, or the catalog is down: the status is long sent.
            yield f"event: error\ndata: {json.dumps(describe_error(error))}\n\n"
            return
        if latest != job:
            job, silent_since = latest, monotonic()
            yield _event("progress", job)
        elif monotonic() - silent_since > _KEEPALIVE_SECONDS:
            silent_since = monotonic()
            yield ": still running\n\n"
    yield _event("done", job)


def _event(name: str, job: Job) -> str:
    return f"event: {name}\ndata: {JobReply.model_validate(job).model_dump_json()}\n\n"
