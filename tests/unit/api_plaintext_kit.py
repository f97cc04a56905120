"""What the tests of documents, turns and search over HTTP share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import count
from typing import Any

import httpx
from api_harness import Served

from memos_vllm.control.tables import GrantRow, PrincipalRow
from memos_vllm.domain.access import PrincipalKind, Role

Part = tuple[str, bytes, str | None]
_numbers = count(1)


async def new_cube(served: Served) -> str:
    """The id of an empty cube; the app is shared by a module's tests."""
    cube_id = f"cube-{next(_numbers)}"
    await served.cube(cube_id)
    return cube_id


def grant(served: Served, cube_id: str, role: Role, *labels: str) -> dict[str, str]:
    """The headers of somebody with this grant."""
    name = f"someone-{next(_numbers)}"
    now = datetime.now(UTC)
    with served.mos._catalog.write() as session:
        session.add(PrincipalRow(id=name, kind=PrincipalKind.USER, name=name, created_at=now))
        session.flush()
        session.add(
            GrantRow(
                cube_id=cube_id,
                principal_id=name,
                role=role,
                labels=list(labels),
                granted_by="local",
                granted_at=now,
            )
        )
    return {"x-test-principal": name}


@asynccontextmanager
async def unchanged(served: Served, cube_id: str) -> AsyncIterator[None]:
    """The block leaves the cube as it was: nothing is half-written."""
    before = await _state(served, cube_id)
    yield
    assert await _state(served, cube_id) == before


async def _state(served: Served, cube_id: str) -> dict[str, Any]:
    cube = (await served.client.get(f"/v1/memcubes/{cube_id}")).json()
    state: dict[str, Any] = {key: cube[key] for key in ("version", "memories", "updated_at")}
    audit = await served.client.get(f"/v1/memcubes/{cube_id}/audit")
    return {**state, "audit": len(audit.json()["data"])}


def form(parts: Sequence[Part], *, boundary: str = "boundary-of-the-tests") -> bytes:
    """A form, byte by byte; a part is its name, content, and file name if it is a file."""
    pieces = []
    for name, content, filename in parts:
        shown = "" if filename is None else f'; filename="{filename}"'
        pieces.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{shown}\r\n\r\n'.encode()
            + content
            + b"\r\n"
        )
    return b"".join([*pieces, f"--{boundary}--\r\n".encode()])


async def post_form(
    served: Served,
    cube_id: str,
    body: bytes,
    *,
    boundary: str = "boundary-of-the-tests",
    headers: dict[str, str] | None = None,
) -> httpx.Response:
    kind = f"multipart/form-data; boundary={boundary}"
    return await served.client.post(
        f"/v1/memcubes/{cube_id}/documents",
        content=body,
        headers={"content-type": kind, **(headers or {})},
    )


async def upload(
    served: Served,
    cube_id: str,
    content: bytes | str,
    filename: str = "handbook.md",
    *,
    headers: dict[str, str] | None = None,
    **fields: str | bytes,
) -> httpx.Response:
    """Send a file as a client does."""
    data = content.encode() if isinstance(content, str) else content
    parts: list[Part] = [("file", data, filename)]
    parts += [
        (name, value.encode() if isinstance(value, str) else value, None)
        for name, value in fields.items()
    ]
    return await post_form(served, cube_id, form(parts), headers=headers)
