"""Documents in the catalog: the same again changes nothing, an edit changes what it touched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from catalog_kit import ADMIN, KEY, Desk, open_desk
from databases import Database

from memos_vllm.domain.document import DocumentOutcome, NewChunk, NewDocument, StoredDocument
from memos_vllm.domain.memory import MemoryPatch, MemoryState
from memos_vllm.errors import InvalidRequest, NotFound

FIRST = "Refunds take five working days after the parcel has arrived."
SECOND = "The returns desk is in Leeds and opens at nine."
THIRD = "Gift cards never expire and can be used online."


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database) as opened:
        yield opened


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def chunk(text: str, *headings: str, page: int | None = None) -> NewChunk:
    return NewChunk(text, " > ".join(headings), headings, page, digest(text))


def document(*texts: str, title: str = "Handbook") -> NewDocument:
    chunks = tuple(chunk(text, "Returns") for text in texts)
    return NewDocument(title, "text/markdown", digest("|".join(texts)), 100, chunks)


def put(desk: Desk, *texts: str, uri: str = "handbook.md", **said: object) -> StoredDocument:
    return desk.mos.put_document(ADMIN, "c", document(*texts), uri=uri, **said)  # type: ignore[arg-type]


def test_a_document_becomes_chunks_tied_to_it_and_to_each_other(desk: Desk) -> None:
    stored = put(desk, FIRST, SECOND, tags=["handbook"])
    first, second = stored.memories
    assert [(edge.kind, edge.target) for edge in first.edges] == [
        ("part-of", stored.document.id),
        ("next", second.id),
    ]
    assert [edge.kind for edge in second.edges] == ["part-of"]
    assert (first.source.uri, first.source.title, first.source.locator) == (
        "handbook.md",
        "Handbook",
        "Returns",
    )
    assert first.metadata["heading_path"] == ["Returns"]
    assert first.tags == ("handbook",)
    assert stored.document.text == "Handbook\nReturns"
    assert (stored.outcome, stored.added) == (DocumentOutcome.ADDED, 2)


def test_the_same_document_again_changes_nothing(desk: Desk) -> None:
    before = put(desk, FIRST, SECOND)
    version = desk.mos.get_cube(ADMIN, "c").version
    again = put(desk, FIRST, SECOND)
    assert again.outcome is DocumentOutcome.UNCHANGED
    assert [memory.id for memory in again.memories] == [memory.id for memory in before.memories]
    assert desk.mos.get_cube(ADMIN, "c").version == version


def test_the_same_content_under_another_name_is_recognised(desk: Desk) -> None:
    before = put(desk, FIRST)
    again = put(desk, FIRST, uri="copy.md")
    assert (again.outcome, again.document.id) == (DocumentOutcome.UNCHANGED, before.document.id)


def test_an_edit_changes_only_the_chunk_it_touched(desk: Desk) -> None:
    before = put(desk, FIRST, SECOND, THIRD)
    edited = FIRST.replace("five", "three")
    after = put(desk, edited, SECOND, THIRD)
    assert (after.outcome, after.added, after.changed, after.archived) == (
        DocumentOutcome.UPDATED,
        0,
        1,
        0,
    )
    assert [memory.id for memory in after.memories] == [memory.id for memory in before.memories]
    assert [memory.version for memory in after.memories] == [2, 1, 1]
    history = desk.mos.memory_history(ADMIN, "c", after.memories[0].id)
    assert [version.text for version in history] == [FIRST, edited]


def test_what_is_new_is_added_and_what_is_gone_is_archived(desk: Desk) -> None:
    before = put(desk, FIRST, SECOND)
    after = put(desk, THIRD, SECOND)
    assert (after.added, after.changed, after.archived) == (1, 0, 1)
    gone = desk.mos.get_memory(ADMIN, "c", before.memories[0].id)
    assert gone.state is MemoryState.ARCHIVED
    assert not gone.edges
    new, kept = after.memories
    assert [edge.target for edge in new.edges] == [after.document.id, kept.id]


def test_moved_chunks_keep_their_memories_and_get_new_edges(desk: Desk) -> None:
    before = put(desk, FIRST, SECOND, THIRD)
    after = put(desk, THIRD, FIRST, SECOND)
    ids = [memory.id for memory in before.memories]
    assert [memory.id for memory in after.memories] == [ids[2], ids[0], ids[1]]
    assert (after.added, after.changed, after.archived) == (0, 0, 0)
    assert [edge.target for edge in after.memories[0].edges if edge.kind == "next"] == [ids[0]]


def test_what_someone_wrote_into_a_chunk_outlives_an_edit_elsewhere(desk: Desk) -> None:
    before = put(desk, FIRST, SECOND)
    own = "Refunds take two days for members."
    desk.mos.update_memory(ADMIN, "c", before.memories[0].id, MemoryPatch(text=own))
    after = put(desk, FIRST, SECOND.replace("nine", "ten"))
    assert after.memories[0].text == own


def test_an_archived_chunk_is_not_brought_back_by_sending_the_document(desk: Desk) -> None:
    before = put(desk, FIRST, SECOND)
    desk.mos.archive_memory(ADMIN, "c", before.memories[0].id)
    after = put(desk, FIRST, SECOND, THIRD)
    states = [memory.state for memory in after.memories]
    assert states == [MemoryState.ARCHIVED, MemoryState.ACTIVE, MemoryState.ACTIVE]


def test_an_erased_document_is_new_when_it_comes_again(desk: Desk) -> None:
    before = put(desk, FIRST)
    desk.mos.erase_memory(ADMIN, "c", before.document.id, tombstone_key=KEY)
    assert put(desk, FIRST).outcome is DocumentOutcome.ADDED


def test_labels_that_are_sent_later_reach_every_chunk(desk: Desk) -> None:
    put(desk, FIRST)
    desk.promote()
    epoch = desk.mos.get_cube(ADMIN, "c").epoch
    after = put(desk, FIRST, labels=["hr"])
    (memory,) = after.memories
    assert (memory.labels, memory.tier.value) == (("hr",), "plaintext")
    assert desk.mos.get_cube(ADMIN, "c").epoch > epoch


def test_a_document_without_text_or_with_a_bad_name_is_refused(desk: Desk) -> None:
    with pytest.raises(InvalidRequest):
        put(desk)
    with pytest.raises(InvalidRequest):
        put(desk, FIRST, uri="two\nlines")
    with pytest.raises(NotFound):
        desk.mos.put_document(ADMIN, "nowhere", document(FIRST), uri="a")
    assert desk.mos.get_cube(ADMIN, "c").memories.active == 0
