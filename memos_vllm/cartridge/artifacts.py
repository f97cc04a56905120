"""Artifacts as an archive carries them: a description and its shards, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from memos_vllm.cartridge.layout import ArtifactFacts, artifact_file, artifact_name
from memos_vllm.cartridge.reader import ArchivedFile, ArchiveReader
from memos_vllm.cartridge.writer import ArchiveFile

_CHUNK_BYTES = 1 << 20


class Content(Protocol):
    """Bytes in order; fewer than asked for only at the end."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class CarriedArtifact:
    """An artifact outside of any store.

    Args:
        description: the store's own words, which nobody else reads.
        shards: size and content of each; to be read in order, once, and before whatever gave
            this artifact gives the next one.
    """

    facts: ArtifactFacts
    description: bytes
    shards: Iterable[tuple[int, Content]]


def artifact_files(artifacts: Iterable[CarriedArtifact]) -> Iterator[ArchiveFile]:
    """The files of artifacts on their way into an archive."""
    for number, artifact in enumerate(artifacts):
        description = artifact.description
        yield ArchiveFile(artifact_name(number, None), len(description), [description])
        for index, (size_bytes, content) in enumerate(artifact.shards):
            yield ArchiveFile(artifact_name(number, index), size_bytes, _chunks(content))


def archived_artifacts(reader: ArchiveReader) -> Iterator[CarriedArtifact]:
    """The artifacts of an archive that was verified; what is left of one is read over."""
    files = _Ahead(reader.files())
    while (file := files.take()) is not None:
        place = artifact_file(file.name)
        if place is not None and place[1] is None:
            yield CarriedArtifact(reader.manifest.artifacts[place[0]], file.whole(), _shards(files))


def _shards(files: _Ahead) -> Iterator[tuple[int, Content]]:
    while (file := files.take_shard()) is not None:
        yield file.size_bytes, file


class _Ahead:
    """Files of an archive, of which the next one's name can be asked before it is taken."""

    def __init__(self, files: Iterator[ArchivedFile]) -> None:
        self._files = files
        self._next: ArchivedFile | None = None

    def take(self) -> ArchivedFile | None:
        file, self._next = self._next or next(self._files, None), None
        return file

    def take_shard(self) -> ArchivedFile | None:
        """The next file, if it is a shard; otherwise it stays."""
        self._next = self._next or next(self._files, None)
        place = None if self._next is None else artifact_file(self._next.name)
        return None if place is None or place[1] is None else self.take()


def _chunks(content: Content) -> Iterator[bytes]:
    while chunk := content.read(_CHUNK_BYTES):
        yield chunk
