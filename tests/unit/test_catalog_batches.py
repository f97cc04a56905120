"""Long lists go to the database in parts that it takes."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from catalog_kit import ADMIN, Desk, open_desk
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event

from memos_vllm.control import batches, documents
from memos_vllm.control.batches import in_parts
from memos_vllm.control.finding import MAX_INCOMING
from memos_vllm.domain.document import NewChunk, NewDocument, StoredDocument

FEW = 100


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """Its SQLite takes so few parameters that a small document is too long for one statement."""
    monkeypatch.setattr(batches, "MAX_VALUES", FEW // 2)
    with open_desk(tmp_path) as opened:
        engine = opened.mos._catalog.engine
        engine.dispose()

        @event.listens_for(engine, "connect")
        def limit(connection: sqlite3.Connection, _: object) -> None:
            connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, FEW)

        yield opened


@given(st.lists(st.integers(), max_size=30))
def test_parts_hold_every_value_once_and_in_order(values: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "MAX_VALUES", 7)
        parts = list(in_parts(values))
    assert [value for part in parts for value in part] == values
    assert all(1 <= len(part) <= 7 for part in parts)


def put(desk: Desk, *texts: str, title: str = "t") -> StoredDocument:
    chunks = tuple(
        NewChunk(text, "", (), None, hashlib.sha256(text.encode()).hexdigest()) for text in texts
    )
    digest = hashlib.sha256("".join((title, *texts)).encode()).hexdigest()
    return desk.mos.put_document(
        ADMIN, "c", NewDocument(title, "text/plain", digest, 9, chunks), uri="a"
    )


def test_a_search_looks_at_more_memories_than_a_statement_has_parameters(desk: Desk) -> None:
    for _ in range(5):
        desk.add(*(f"memory {number}" for number in range(45)))
    scope = desk.mos.search_scope(ADMIN, ["c"])
    seqs = list(range(1, 226))
    assert list(desk.mos.facts(seqs)) == seqs
    assert sorted(desk.mos.load_found(scope, [*seqs, 9999], answering=True)) == seqs
    assert desk.mos.authored(scope, ["ada"], seqs) == set()


def test_a_memory_that_many_lead_to_costs_no_more_than_some(desk: Desk) -> None:
    first = put(desk, *(f"piece {number}" for number in range(90)), title="one")
    scope = desk.mos.search_scope(ADMIN, ["c"])
    links = desk.mos.links(scope, [1], fan_out=1000)
    assert len(links) == MAX_INCOMING < first.chunks
    assert {link.kind for link in links} == {"part-of"}
    # Lower numbers first among equals, and only those of the fan-out.
    nearest = desk.mos.links(scope, [1], fan_out=2)
    assert [link.target for link in nearest] == [2, 3]


def test_all_chunks_of_a_long_document_may_change_at_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_BATCH", FEW // 2)
    texts = [f"piece {number}" for number in range(2 * FEW)]
    put(desk, *texts, title="one")
    after = put(desk, *texts, title="two")
    assert after.changed == len(texts)
    assert {memory.source.title for memory in after.memories} == {"two"}
