"""An upload: a document and what its sender says of it, as memories to be."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from memos_vllm.domain.checks import (
    JsonObject,
    JsonValue,
    check_json_object,
    check_line,
    check_words,
)
from memos_vllm.domain.document import CHUNK_KIND, DOCUMENT_KIND, NewChunk, NewDocument
from memos_vllm.domain.memory import MemoryPatch, NewMemory, Source, checked_memory
from memos_vllm.domain.patch import UNSET
from memos_vllm.errors import InvalidRequest, TooLarge

MAX_URI_CHARS = 2048
MAX_TITLE_CHARS = 512
# Tags, labels and metadata are kept with each chunk.
MAX_SAID_BYTES = 64 * 1024 * 1024
# Metadata that says where a piece stands; it is ours, not the sender's.
_OWN_KEYS: Final = frozenset({"heading_path", "page", "media_type"})
# What stands for the whole document says what it holds, in as many headings as fit here.
_MAX_OUTLINE_CHARS = 4000


@dataclass(frozen=True, slots=True)
class Upload:
    """A document and what its sender says of it, checked.

    Args:
        whole: the memory that stands for the document.
        pieces: the memory of each chunk, in order.
    """

    document: NewDocument
    uri: str
    tags: tuple[str, ...]
    labels: tuple[str, ...]
    metadata: JsonObject
    whole: NewMemory
    pieces: tuple[NewMemory, ...]

    @property
    def says_more(self) -> bool:
        """Whether the sender said anything of the document besides its bytes."""
        return bool(self.tags or self.labels or self.metadata)

    def patch(self, memory: NewMemory, *, known: Mapping[str, Any], with_text: bool) -> MemoryPatch:
        """What brings a known memory to what was read now; what was not said stays.

        Args:
            memory: one of ours.
            known: its metadata as it is stored.
        """
        assert memory.source is not None
        return MemoryPatch(
            text=memory.text if with_text else UNSET,
            tags=memory.tags if self.tags else UNSET,
            labels=memory.labels if self.labels else UNSET,
            metadata=self._metadata(memory, known),
            source=memory.source,
        )

    def joining(
        self, memory: NewMemory, *, tags: list[str], labels: list[str], known: Mapping[str, Any]
    ) -> NewMemory:
        """A new piece of a known document, which has what was said of the document before: what
        is under a label does not lose it by being edited."""
        return replace(
            memory,
            tags=self.tags or tuple(tags),
            labels=self.labels or tuple(labels),
            metadata=self._metadata(memory, known),
        )

    def _metadata(self, memory: NewMemory, known: Mapping[str, Any]) -> JsonObject:
        if self.metadata:
            return memory.metadata
        others = {key: value for key, value in known.items() if key not in _OWN_KEYS}
        return {**others, **memory.metadata}


def checked_upload(
    document: NewDocument,
    *,
    uri: str,
    tags: Sequence[str],
    labels: Sequence[str],
    metadata: JsonObject,
) -> Upload:
    """Raises InvalidRequest, TooLarge: a field, or a document without chunks."""
    check_line(uri, param="uri", max_chars=MAX_URI_CHARS)
    check_line(document.title, param="title", max_chars=MAX_TITLE_CHARS)
    words = (check_words(tags, param="tags"), check_words(labels, param="labels"))
    said = check_json_object(metadata, param="metadata")
    if not document.chunks:
        raise InvalidRequest("the document holds no text", param="file")
    said_bytes = len(json.dumps([*words, said])) * len(document.chunks)
    if said_bytes > MAX_SAID_BYTES:
        raise TooLarge(
            f"tags, labels and metadata are kept with each of the {len(document.chunks)} chunks "
            f"and take {said_bytes} bytes together; the limit is {MAX_SAID_BYTES}: say less of it"
        )

    def memory(
        text: str, own: dict[str, JsonValue], *, kind: str, locator: str | None, param: str
    ) -> NewMemory:
        source = Source(kind=kind, uri=uri, title=document.title, locator=locator)
        return checked_memory(
            NewMemory(text, words[0], source, labels=words[1], metadata={**said, **own}),
            param=param,
        )

    about = {"media_type": document.media_type}
    return Upload(
        document,
        uri,
        *words,
        said,
        memory(_outline(document), {**about}, kind=DOCUMENT_KIND, locator=None, param="document"),
        tuple(
            memory(
                chunk.text,
                _place(chunk),
                kind=CHUNK_KIND,
                locator=chunk.locator or None,
                param="chunk",
            )
            for chunk in document.chunks
        ),
    )


def _place(chunk: NewChunk) -> dict[str, JsonValue]:
    place: dict[str, JsonValue] = {}
    if chunk.heading_path:
        place["heading_path"] = list(chunk.heading_path)
    if chunk.page is not None:
        place["page"] = chunk.page
    return place


def heading_line(path: Sequence[str]) -> str:
    """A chunk's headings as a line of its document's outline."""
    return " > ".join(path)


def withheld_lines(
    labels: Sequence[str], chunks: Iterable[tuple[Sequence[str], Sequence[str]]]
) -> set[str]:
    """Headings that stand only over chunks under a label that their document lacks.

    Args:
        labels: of the memory that stands for the document.
        chunks: labels and headings of each.
    """
    shown: set[str] = set()
    hidden: set[str] = set()
    for chunk_labels, path in chunks:
        (shown if set(chunk_labels) <= set(labels) else hidden).add(heading_line(path))
    return hidden - shown


def without_lines(outline: str, lines: Collection[str]) -> str:
    """An outline without these headings; its title stays."""
    title, *headings = outline.split("\n")
    return "\n".join([title, *(line for line in headings if line not in lines)])


def _outline(document: NewDocument) -> str:
    """The title and the headings of a document, each once, as text."""
    lines = [document.title]
    size = len(document.title)
    for path in dict.fromkeys(chunk.heading_path for chunk in document.chunks):
        line = heading_line(path)
        size += len(line) + 1
        if size > _MAX_OUTLINE_CHARS:
            lines.append("…")
            break
        if line and line != document.title:
            lines.append(line)
    return "\n".join(lines)
