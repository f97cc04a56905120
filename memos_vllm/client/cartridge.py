"""Archives of cubes between a file and the server, a piece at a time."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeAlias

import httpx

from memos_vllm.client.errors import ServerUnreachable, UnexpectedReply
from memos_vllm.client.fields import Fields
from memos_vllm.client.objects import CubeInfo, Json, MemoryInfo
from memos_vllm.client.session import Session
from memos_vllm.client.steps import Flow, Save, Work
from memos_vllm.client.wire import Call, FileStream
from memos_vllm.errors import InvalidRequest, TooLarge

_CHUNK_BYTES = 256 << 10

FilePath: TypeAlias = str | os.PathLike[str]
# Called with the bytes that went so far.
OnBytes: TypeAlias = Callable[[int], None]


class FileBody(FileStream):
    """A file as the body of a request."""

    def __init__(self, path: Path, on_bytes: OnBytes | None) -> None:
        self.size_bytes = path.stat().st_size
        self._path = path
        self._on_bytes = on_bytes

    def __iter__(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
                self._report(file)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with self._path.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
                yield chunk
                self._report(file)

    def _report(self, file: IO[bytes]) -> None:
        if self._on_bytes is not None:
            self._on_bytes(file.tell())


@dataclass(frozen=True, slots=True)
class CubeArrival:
    """How a cube came here, by import or clone.

    Args:
        origin: its id where it came from.
        memory_ids: former and new ids of the first 1,000 memories, when they were mapped.
        warnings: what was not taken over, and why.
    """

    info: CubeInfo
    origin: str
    memory_ids: Json
    warnings: tuple[str, ...]
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, body: object) -> CubeArrival:
        cube = Fields(body, "memcube")
        return cls(
            info=CubeInfo.from_json(body),
            origin=cube.text("origin"),
            memory_ids=cube.mapping("memory_ids"),
            warnings=cube.names("warnings"),
            raw=cube.raw,
        )


@dataclass(frozen=True, slots=True)
class MemoryDifference:
    """A memory that two cubes do not share; `kind` is only_here, only_there or changed."""

    kind: str
    here: MemoryInfo | None
    there: MemoryInfo | None
    fields: tuple[str, ...]
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, body: object) -> MemoryDifference:
        entry = Fields(body, "difference")
        here, there = entry.raw.get("here"), entry.raw.get("there")
        return cls(
            kind=entry.text("kind"),
            here=None if here is None else MemoryInfo.from_json(here),
            there=None if there is None else MemoryInfo.from_json(there),
            fields=entry.names("fields"),
            raw=entry.raw,
        )


def download(
    session: Session,
    cube_path: str,
    path: FilePath,
    *,
    include: Sequence[str] | None,
    on_bytes: OnBytes | None,
) -> Flow[Path]:
    """Write a cube's archive to a file, which appears once all of it was verified."""
    target = Path(path)
    call = Call(
        "GET",
        f"{cube_path}/export",
        lambda _: None,
        query={"include": None if include is None else ",".join(include)},
        slow=True,
    )
    response = yield from session.open_stream(call)
    waiting = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with waiting.open("xb+") as file:
            try:
                yield Save(response, file, on_bytes)
            except httpx.RequestError as error:
                raise ServerUnreachable(
                    f"the connection broke while {target.name} was received; nothing was written"
                ) from error
            yield Work(lambda: _check(file))
        waiting.replace(target)
    finally:
        waiting.unlink(missing_ok=True)
    return target


def upload(
    session: Session,
    path: FilePath,
    *,
    cube_id: str | None,
    trust_artifacts: bool,
    replace: bool,
    on_bytes: OnBytes | None,
) -> Flow[CubeArrival]:
    """Send an archive; all of it becomes a cube, or nothing."""
    call = Call(
        "POST",
        "/v1/memcubes/import",
        CubeArrival.from_json,
        query={
            "id": cube_id,
            "trust_artifacts": None if trust_artifacts else "false",
            "replace": "true" if replace else None,
        },
        file=FileBody(Path(path), on_bytes),
        slow=True,
    )
    return (yield from session.call(call))


def _check(file: IO[bytes]) -> None:
    # Imported here: most callers of the client never see an archive.
    from memos_vllm.cartridge.reader import verify

    file.flush()
    file.seek(0)
    try:
        verify(file)
    except (InvalidRequest, TooLarge) as error:
        raise UnexpectedReply(f"what the server sent is no whole archive: {error}") from error
    os.fsync(file.fileno())
