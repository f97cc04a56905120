"""Reading and exporting the audit log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import datetime

import httpx

from memos_vllm.client.errors import ServerUnreachable
from memos_vllm.client.flow import Awaited, Blocking, Listing
from memos_vllm.client.objects import Json, Page, page_of, raw_object
from memos_vllm.client.session import Session
from memos_vllm.client.steps import Flow
from memos_vllm.client.wire import Call, encode_time


def audit_query(
    *, actor: str | None, action: str | None, since: datetime | None, until: datetime | None
) -> dict[str, str | None]:
    """The filters of a look into the log, as query parameters."""
    return {
        "actor": actor,
        "action": action,
        "since": None if since is None else encode_time(since, param="since"),
        "until": None if until is None else encode_time(until, param="until"),
    }


def audit_listing(
    session: Session, path: str, query: dict[str, str | None], *, limit: int | None
) -> Listing[Json]:
    """Entries of a log, newest first."""

    def fetch(size: int, cursor: str | None) -> Flow[Page[Json]]:
        paged = {**query, "limit": size, "cursor": cursor}
        return session.call(Call("GET", path, page_of(raw_object), query=paged))

    return Listing(fetch, limit=limit)


def export_parts(client: Blocking, path: str) -> Iterator[bytes]:
    """The bytes of an export, as they come."""
    response = client._run(client._session.open_stream(_export(path)))
    try:
        yield from response.iter_raw()
    except httpx.RequestError as error:
        raise _broken(error) from error
    finally:
        response.close()


async def aexport_parts(client: Awaited, path: str) -> AsyncIterator[bytes]:
    """`export_parts`, awaited."""
    response = await client._run(client._session.open_stream(_export(path)))
    try:
        async for part in response.aiter_raw():
            yield part
    except httpx.RequestError as error:
        raise _broken(error) from error
    finally:
        await response.aclose()


def _export(path: str) -> Call[None]:
    # The body is read part by part, and compressed it would be no lines.
    return Call("GET", path, lambda _body: None, headers={"Accept-Encoding": "identity"})


def _broken(error: httpx.RequestError) -> ServerUnreachable:
    return ServerUnreachable(
        f"the connection broke in the middle of the export ({error or type(error).__name__})"
    )
