"""Archives on disk: packed before they are sent, received and verified before they are used.

What is sent lies in files first, so that a slow client holds no state of the catalog; what is
received does, so that nothing is looked at before all of it was verified. The files have no names:
whatever ends this process removes them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO

import anyio.to_thread
from blake3 import blake3
from fastapi import Request

import memos_vllm
from memos_vllm.api.gateway import CartridgeSupport
from memos_vllm.cartridge.artifacts import CarriedArtifact, archived_artifacts, artifact_files
from memos_vllm.cartridge.layout import MANIFEST, Manifest, Part
from memos_vllm.cartridge.reader import ArchiveReader, verify
from memos_vllm.cartridge.writer import ArchiveFile, write_archive
from memos_vllm.control.exporting import ExportHead
from memos_vllm.control.importing import MAX_STAGED_BYTES
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import Principal
from memos_vllm.errors import InvalidRequest, TooLarge

_CHUNK_BYTES = 1 << 20
# The audit log of another server is for people; it is verified and goes no further.
_STAGED = frozenset(part.file_name for part in Part if part is not Part.AUDIT)


def pack(
    mos: Mos,
    actor: Principal,
    cube_id: str,
    *,
    include: Sequence[str],
    support: CartridgeSupport,
) -> tuple[Manifest, Iterator[bytes]]:
    """An archive of what the actor may see of a cube; blocks until its text is on disk.

    Returns:
        Its manifest, and its bytes, which are made as they are taken.
    Raises:
        NotFound: the cube.
    """
    with ExitStack() as opened:
        files = {
            part: opened.enter_context(tempfile.TemporaryFile(dir=support.spool_dir))
            for part in Part
        }
        counts = dict.fromkeys(map(str, Part), 0)
        head: ExportHead | None = None
        for item in mos.export_cube(actor, cube_id):
            if isinstance(item, ExportHead):
                head = item
                continue
            files[item.part].write(item.lines)
            counts[item.part] += item.count
        assert head is not None, "the head comes first"
        artifacts: Sequence[CarriedArtifact] = ()
        if "activation" in include:
            artifacts = support.open_artifacts(cube_id)
        manifest = Manifest(
            created_at=datetime.now(UTC),
            created_by=f"memos_vllm {memos_vllm.__version__}",
            include=tuple(include),
            whole=head.whole,
            cube=head.facts,
            counts=counts,
            artifacts=tuple(artifact.facts for artifact in artifacts),
        )
        return manifest, _packed(manifest, files, artifacts, opened.pop_all())


def _packed(
    manifest: Manifest,
    files: Mapping[Part, IO[bytes]],
    artifacts: Sequence[CarriedArtifact],
    opened: ExitStack,
) -> Iterator[bytes]:
    with opened:
        yield from write_archive(_files(manifest, files, artifacts))


def _files(
    manifest: Manifest, files: Mapping[Part, IO[bytes]], artifacts: Sequence[CarriedArtifact]
) -> Iterator[ArchiveFile]:
    data = manifest.model_dump_json(indent=1).encode()
    yield ArchiveFile(MANIFEST, len(data), [data])
    for part, file in files.items():
        size_bytes = file.tell()
        file.seek(0)
        yield ArchiveFile(part.file_name, size_bytes, _chunks(file))
    yield from artifact_files(artifacts)


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


@dataclass(frozen=True, slots=True)
class ReceivedArchive:
    """A whole archive on disk, verified.

    Attributes:
        digest: hex BLAKE3 of its bytes.
    """

    file: IO[bytes]
    manifest: Manifest
    digest: str

    def stage(self, mos: Mos, import_id: str, *, vectors: bool) -> int:
        """Hand its records to the catalog, in so many chunks; blocks."""
        chunks = 0
        for chunks, (part, lines) in enumerate(self._lines(vectors=vectors), start=1):
            mos.stage_import(import_id, chunks - 1, part, lines)
        return chunks

    def artifacts(self) -> Iterator[CarriedArtifact]:
        """Its artifacts, read as they are asked for."""
        yield from archived_artifacts(self._reader())

    def _lines(self, *, vectors: bool) -> Iterator[tuple[Part, bytes]]:
        for file in self._reader().files():
            if file.name not in _STAGED:
                return
            part = Part(file.name.removesuffix(".jsonl"))
            if part is Part.VECTORS and not vectors:
                return
            waiting = bytearray()
            for line in file.lines():
                waiting += line + b"\n"
                if len(waiting) >= MAX_STAGED_BYTES:
                    yield part, bytes(waiting)
                    waiting.clear()
            if waiting:
                yield part, bytes(waiting)

    def _reader(self) -> ArchiveReader:
        self.file.seek(0)
        return ArchiveReader(self.file)


async def receive(request: Request, file: IO[bytes], *, max_bytes: int) -> str:
    """Write a request's body to a file as it comes; the hex BLAKE3 of it.

    Raises:
        InvalidRequest: there is none.
        TooLarge: nothing past the limit is written.
    """
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    hasher, size, waiting = blake3(), 0, bytearray()

    def put_down() -> None:
        hasher.update(bytes(waiting))
        file.write(waiting)

    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        waiting += chunk
        if len(waiting) >= _CHUNK_BYTES:
            await anyio.to_thread.run_sync(put_down)
            waiting.clear()
    await anyio.to_thread.run_sync(put_down)
    if not size:
        raise InvalidRequest("the body is empty; send the .memcube archive itself")
    return hasher.hexdigest()


def check(file: IO[bytes], digest: str) -> ReceivedArchive:
    """Verify a received archive; raises InvalidRequest, TooLarge."""
    file.seek(0)
    return ReceivedArchive(file, verify(file), digest)


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"the archive is over the limit of {max_bytes} bytes; serve with a larger "
        "--max-import-gib, or export without activation"
    )
