"""Files to the bytes of an archive, in constant memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import zstandard
from blake3 import blake3

from memos_vllm.cartridge import ustar
from memos_vllm.cartridge.layout import CHECKSUMS

# KV hardly shrinks, at any level; text shrinks to a quarter at this one.
_LEVEL = 1
_CHUNK_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    """A file on its way into an archive; its size is known before its first byte."""

    name: str
    size_bytes: int
    chunks: Iterable[bytes]


def write_archive(files: Iterable[ArchiveFile]) -> Iterator[bytes]:
    """The archive's bytes; a file's chunks are asked for when its turn comes.

    Raises:
        ValueError: a file gave more or fewer bytes than it said.
    """
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compressobj()
    waiting = bytearray()
    for piece in _tar(files):
        waiting += compressor.compress(piece)
        if len(waiting) >= _CHUNK_BYTES:
            yield bytes(waiting)
            waiting.clear()
    waiting += compressor.flush()
    yield bytes(waiting)


def _tar(files: Iterable[ArchiveFile]) -> Iterator[bytes]:
    sums: dict[str, dict[str, object]] = {}
    for file in files:
        hasher, left = blake3(), file.size_bytes
        yield ustar.header(file.name, file.size_bytes)
        for chunk in file.chunks:
            hasher.update(chunk)
            left -= len(chunk)
            yield chunk
        if left:
            raise ValueError(f"{file.name} was to have {file.size_bytes} bytes; {left} are missing")
        yield bytes(ustar.padding(file.size_bytes))
        sums[file.name] = {"size": file.size_bytes, "blake3": hasher.hexdigest()}
    table = json.dumps({"files": sums}, indent=1).encode()
    yield ustar.header(CHECKSUMS, len(table)) + table + bytes(ustar.padding(len(table)))
    yield ustar.END
