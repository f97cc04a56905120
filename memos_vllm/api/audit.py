"""Routes of the audit log: read, export, verify."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from memos_vllm.api import examples
from memos_vllm.api.context import Call, CurrentCall
from memos_vllm.api.replies import ListReply, Reply, render
from memos_vllm.api.route import MemosRoute
from memos_vllm.api.schemas import PageQuery, PathId, Phrase, Time
from memos_vllm.domain.audit import AuditFilter, AuditProblem

router = APIRouter(route_class=MemosRoute, tags=["audit"])

_LINES = "application/x-ndjson"


class AuditReply(Reply):
    object: Literal["audit.entry"] = "audit.entry"
    seq: int
    at: datetime
    actor: str
    action: str
    cube_id: str | None
    subject: str | None
    details: dict[str, Any]
    previous_hash: str
    hash: str


class AuditVerdictReply(Reply):
    object: Literal["audit.verdict"] = "audit.verdict"
    ok: bool
    entries: int
    head_hash: str
    bad_seq: int | None
    problem: AuditProblem | None
    message: str


class AuditQuery(PageQuery):
    """Which entries of the log."""

    actor: Phrase | None = Field(default=None, description="Who did it.")
    action: Phrase | None = Field(default=None, description="What was done: `memory.update`.")
    since: Time | None = Field(default=None, description="At this time or later.")
    until: Time | None = Field(default=None, description="Before this time.")

    def to_domain(self) -> AuditFilter:
        return AuditFilter(self.actor, self.action, self.since, self.until)


@router.get(
    "/v1/memcubes/{cube_id}/audit",
    summary="Read a cube's audit log",
    response_model=ListReply[AuditReply],
    responses=examples.answers(examples.page(examples.AUDIT), 200),
)
async def cube_audit(
    call: CurrentCall, cube_id: PathId, query: Annotated[AuditQuery, Query()]
) -> Response:
    """Every change of the cube, and every reading of what is labelled, newest first.

    For the cube's owners and auditors. Never a memory's text.
    """
    return await _entries(call, cube_id, query)


@router.get(
    "/v1/audit",
    summary="Read the audit log",
    response_model=ListReply[AuditReply],
    responses=examples.answers(examples.page(examples.AUDIT), 200),
)
async def whole_audit(call: CurrentCall, query: Annotated[AuditQuery, Query()]) -> Response:
    """The log of all cubes, also of those that are gone; for administrators."""
    return await _entries(call, None, query)


@router.get(
    "/v1/memcubes/{cube_id}/audit/export",
    summary="Export a cube's audit log",
    response_class=StreamingResponse,
    responses={200: {"content": {_LINES: {"example": examples.AUDIT_LINES}}}},
)
async def export_cube_audit(call: CurrentCall, cube_id: PathId) -> Response:
    """The cube's entries, oldest first, one JSON object a line; for its owners and auditors."""
    return await _export(call, cube_id)


@router.get(
    "/v1/audit/export",
    summary="Export the audit log",
    response_class=StreamingResponse,
    responses={200: {"content": {_LINES: {"example": examples.AUDIT_LINES}}}},
)
async def export_audit(call: CurrentCall) -> Response:
    """The whole log, oldest first, one JSON object a line, then a line that says where it ends.

    For administrators. `memos-vllm audit verify FILE` checks such a file without a server.
    """
    return await _export(call, None)


@router.get(
    "/v1/audit/verify",
    summary="Verify the audit log",
    response_model=AuditVerdictReply,
    responses=examples.answers(examples.VERDICT, 200),
)
async def verify_audit(call: CurrentCall) -> Response:
    """Check the hash chain of the whole log; a broken one names its first bad row.

    For administrators.
    """
    return await call.api.read(
        lambda: render(AuditVerdictReply.model_validate(call.mos.verify_audit(call.actor)))
    )


async def _entries(call: Call, cube_id: str | None, query: AuditQuery) -> Response:
    def read() -> Response:
        page = call.mos.audit_entries(
            call.actor, cube_id, which=query.to_domain(), limit=query.limit, cursor=query.cursor
        )
        data = [AuditReply.model_validate(entry) for entry in page.items]
        return render(ListReply[AuditReply](data=data, next_cursor=page.next_cursor))

    return await call.api.read(read)


async def _export(call: Call, cube_id: str | None) -> Response:
    parts = call.mos.export_audit(call.actor, cube_id)
    # Whoever may not read it is told so before the answer begins.
    first = await call.api.read(next, parts, b"")
    return StreamingResponse(_stream(call, first, parts), media_type=_LINES)


async def _stream(call: Call, first: bytes, parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    part: bytes | None = first
    while part is not None:
        yield part
        part = await call.api.read(next, parts, None)
