"""The bytes of an archive to its files, in constant memory, and nothing taken on trust."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO

import zstandard
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, ValidationError

from memos_vllm.cartridge import ustar
from memos_vllm.cartridge.layout import (
    CHECKSUMS,
    MANIFEST,
    MAX_ARTIFACT_BYTES,
    MAX_DESCRIPTION_BYTES,
    MAX_JSON_BYTES,
    MAX_LINE_BYTES,
    MAX_PART_BYTES,
    MAX_SHARDS,
    Manifest,
    Part,
    artifact_file,
    artifact_name,
    invalid,
    parse_manifest,
)
from memos_vllm.errors import InvalidRequest, TooLarge

_MAGIC = b"\x28\xb5\x2f\xfd"
# What is decompressed in one go: four bytes of zstd can stand for 128 KiB, so at most 32 MiB.
_SLICE_BYTES = 1 << 10
# Our writer's windows have 512 KiB; `zstd -19` makes some of 8 MiB.
_MAX_WINDOW_BYTES = 8 << 20
# One text a thousand times shrinks as much as a bomb does, so the first part of it is allowed.
_FREE_BYTES = 256 << 20
_MAX_RATIO = 1000
# GNU tar fills its last record.
_MAX_END_BLOCKS = 20
_READ_BYTES = 256 << 10


class _FileSum(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    size: int
    blake3: str


class _Sums(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    files: dict[str, _FileSum]


class ArchiveReader:
    """One pass over an archive; what it hands out before the end is not verified yet.

    So go through it once with `verify`, and use what it holds in a second pass over the same
    bytes. Every refusal is an InvalidRequest, or TooLarge for a limit.

    Attributes:
        manifest: the archive's first file, read by the constructor.
    """

    def __init__(self, source: IO[bytes]) -> None:
        self._bytes = _Decompressed(source)
        self._sums: dict[str, _FileSum] = {}
        self._file: ArchivedFile | None = None
        first = self._next()
        if first is None or first.name != MANIFEST:
            raise InvalidRequest(f"the archive does not begin with {MANIFEST}; is it a .memcube?")
        self.manifest: Manifest = parse_manifest(first.whole())

    def files(self) -> Iterator[ArchivedFile]:
        """The files after the manifest; each must be read before the next one is asked for.

        What is left of one is read over. After the last one the checksums have been compared.
        """
        wanted = [part.file_name for part in Part]
        artifacts, shards = 0, 0
        while True:
            file = self._next()
            if file is None:
                raise InvalidRequest(f"the archive has no {CHECKSUMS}; it is not complete")
            if wanted:
                if file.name != wanted.pop(0):
                    raise _out_of_place(file.name)
            elif file.name == CHECKSUMS:
                break
            else:
                artifacts, shards = _check_place(file.name, artifacts=artifacts, shards=shards)
            yield file
        if artifacts != len(self.manifest.artifacts):
            raise InvalidRequest(
                f"{MANIFEST} names {len(self.manifest.artifacts)} artifacts and the archive "
                f"holds {artifacts}"
            )
        self._compare(file)

    def _next(self) -> ArchivedFile | None:
        if self._file is not None:
            self._sums[self._file.name] = self._file.finish()
        block = self._bytes.exactly(ustar.BLOCK)
        if not any(block):
            return None
        name, size_bytes = ustar.parse(block)
        if name in self._sums:
            raise InvalidRequest(f"the archive holds {name} twice")
        limit = _limit_of(name)
        if size_bytes > limit:
            raise TooLarge(f"{name} has {size_bytes} bytes and the limit is {limit}")
        self._file = ArchivedFile(name, size_bytes, self._bytes)
        return self._file

    def _compare(self, table: ArchivedFile) -> None:
        try:
            stated = _Sums.model_validate_json(table.whole()).files
        except ValidationError as error:
            raise invalid(CHECKSUMS, error) from None
        table.finish()
        if stated.keys() != self._sums.keys():
            raise InvalidRequest(f"{CHECKSUMS} names other files than the archive holds")
        for name, found in self._sums.items():
            if stated[name] != found:
                raise InvalidRequest(
                    f"{name} differs from its checksum: the archive was damaged or changed"
                )
        self._bytes.check_end()


class ArchivedFile:
    """A file of an archive while the reader stands at it."""

    def __init__(self, name: str, size_bytes: int, source: _Decompressed) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self._source = source
        self._left = size_bytes
        self._hasher = blake3()

    def read(self, size: int, /) -> bytes:
        """The next bytes; fewer than asked for at the end of the file."""
        data = self._source.exactly(min(size, self._left))
        self._left -= len(data)
        self._hasher.update(data)
        return data

    def whole(self) -> bytes:
        """The content of a small file, which the reader has kept to its limit."""
        return self.read(self.size_bytes)

    def lines(self) -> Iterator[bytes]:
        """Its lines without their ends; the last one has one, too."""
        rest = b""
        while chunk := self.read(_READ_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                _check_line(self.name, line)
                yield line
            _check_line(self.name, rest)
        if rest:
            raise InvalidRequest(f"{self.name} ends in the middle of a line")

    def finish(self) -> _FileSum:
        """Read over what is left; size and digest."""
        while self._left:
            self.read(_READ_BYTES)
        if any(self._source.exactly(ustar.padding(self.size_bytes))):
            raise InvalidRequest(f"something stands behind {self.name} that no file holds")
        return _FileSum(size=self.size_bytes, blake3=self._hasher.hexdigest())


def verify(source: IO[bytes]) -> Manifest:
    """Read a whole archive and find it good; what it holds is neither kept nor understood.

    Raises:
        InvalidRequest, TooLarge: the first thing that is wrong.
    """
    reader = ArchiveReader(source)
    for file in reader.files():
        if not file.name.endswith(".jsonl"):
            continue
        part = Part(file.name.removesuffix(".jsonl"))
        lines = 0
        for lines, line in enumerate(file.lines(), start=1):
            if lines > part.max_lines:
                break
            _check_json(file.name, line)
        if lines != reader.manifest.counts[part]:
            raise InvalidRequest(
                f"{MANIFEST} counts {reader.manifest.counts[part]} lines in {file.name} and there "
                "are others"
            )
    return reader.manifest


def _check_json(name: str, line: bytes) -> None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{name} holds a line that is not JSON") from None
    if not isinstance(found, dict):
        raise InvalidRequest(f"{name} holds a line that is no JSON object")


def _check_line(name: str, line: bytes) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise TooLarge(f"{name} holds a line of more than {MAX_LINE_BYTES} bytes")


def _limit_of(name: str) -> int:
    if name.endswith(".jsonl"):
        return MAX_PART_BYTES
    place = artifact_file(name)
    if place is None:
        return MAX_JSON_BYTES
    return MAX_DESCRIPTION_BYTES if place[1] is None else MAX_ARTIFACT_BYTES


def _check_place(name: str, *, artifacts: int, shards: int) -> tuple[int, int]:
    """How many artifacts and shards of the last one there are with this file."""
    if artifacts and name == artifact_name(artifacts - 1, shards) and shards < MAX_SHARDS:
        return artifacts, shards + 1
    if name == artifact_name(artifacts, None):
        return artifacts + 1, 0
    raise _out_of_place(name)


def _out_of_place(name: str) -> InvalidRequest:
    return InvalidRequest(f"{name} does not belong into the archive, or not at its place")


class _Decompressed:
    """The tar inside the zstd frame: read exactly, never past the limits."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
        self._ready = bytearray()
        self._slices: Iterator[bytes] = iter(())
        self._taken = self._given = 0
        magic = source.read(4)
        if magic != _MAGIC:
            raise InvalidRequest(
                "this is no .memcube archive (a tar file compressed with zstd); send the file "
                "itself as the body"
            )
        self._feed(magic)

    def exactly(self, size: int) -> bytes:
        """So many bytes; raises InvalidRequest when the archive ends before."""
        while len(self._ready) < size:
            if not self._fill():
                raise InvalidRequest("the archive is not complete: it ends too early")
        data = bytes(self._ready[:size])
        del self._ready[:size]
        return data

    def check_end(self) -> None:
        """Raises InvalidRequest when anything but the tar's end is left, inside or behind."""
        ending = 0
        while self._ready or self._fill():
            ending += len(self._ready)
            if any(self._ready) or ending > _MAX_END_BLOCKS * ustar.BLOCK:
                raise InvalidRequest("something stands behind the archive's last file")
            self._ready.clear()
        if not self._frame.eof:
            raise InvalidRequest("the archive is not complete: it ends too early")
        if ending % ustar.BLOCK or ending < len(ustar.END):
            raise InvalidRequest("the archive is not complete: its tar has no end")
        if self._frame.unused_data or next(self._slices, b"") or self._source.read(1):
            raise InvalidRequest("something stands behind the archive's end")

    def _fill(self) -> bool:
        """Decompress a little more; False when nothing more comes."""
        if self._frame.eof:
            return False
        piece = next(self._slices, None)
        if piece is None:
            read = self._source.read(_READ_BYTES)
            if not read:
                return False
            self._slices = (
                read[start : start + _SLICE_BYTES] for start in range(0, len(read), _SLICE_BYTES)
            )
            piece = next(self._slices)
        self._feed(piece)
        return True

    def _feed(self, piece: bytes) -> None:
        try:
            data = self._frame.decompress(piece)
        except (zstandard.ZstdError, MemoryError):
            raise InvalidRequest("the archive is damaged: it cannot be decompressed") from None
        self._taken += len(piece)
        self._given += len(data)
        if self._given > _FREE_BYTES and self._given > _MAX_RATIO * self._taken:
            raise TooLarge(
                f"the archive grows to more than {_MAX_RATIO} times its size; it is refused"
            )
        self._ready += data
