"""Erasing: nothing of the text is left in any file of the catalog."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from pathlib import Path

import pytest
from catalog_kit import ADMIN, KEY, Desk, open_desk
from databases import Database

from memos_vllm.control.erasing import order_of
from memos_vllm.control.idempotency import forget_replies
from memos_vllm.domain.erasure import ErasureOrder, Removed
from memos_vllm.domain.job import JobKind, JobState
from memos_vllm.domain.memory import Edge, MemoryPatch, Source
from memos_vllm.errors import ConfigurationError, Conflict, NotFound

WORDS = ("quicksilver", "brimstone", "vitriol")


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database) as opened:
        yield opened


@pytest.mark.parametrize("length", [1, 5000])
def test_no_version_tag_title_or_reason_of_an_erased_memory_is_on_the_disk(
    desk: Desk, length: int
) -> None:
    (memory,) = desk.add(f"{WORDS[0]} " * length, tags=(WORDS[1],), source=Source(title=WORDS[2]))
    desk.mos.update_memory(ADMIN, "c", memory.id, MemoryPatch(text="new", reason=WORDS[0]))
    (kept,) = desk.add("kept text", edges=(Edge("next", memory.id),))
    assert all(word.encode() in desk.stored_bytes() for word in WORDS)
    erased = desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY)
    assert (erased.versions, erased.epoch) == (2, 2)
    left = desk.stored_bytes()
    assert not any(word.encode() in left for word in WORDS)
    assert b"kept text" in left
    assert desk.mos.get_memory(ADMIN, "c", kept.id).edges == ()
    for table in ("memory_versions", "edges", "memory_tags"):
        (number,) = desk.sql(f"SELECT count(*) FROM {table}")[0]
        assert number == (1 if table == "memory_versions" else 0)


def test_an_erased_memory_is_gone_and_its_audit_row_proves_what_it_said(desk: Desk) -> None:
    (memory,) = desk.add("first")
    desk.mos.update_memory(ADMIN, "c", memory.id, MemoryPatch(text="second"))
    desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY)
    for call in (desk.mos.get_memory, desk.mos.memory_history, desk.mos.restore_memory):
        with pytest.raises(NotFound):
            call(ADMIN, "c", memory.id)
    with pytest.raises(NotFound):
        desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY)
    entry = desk.mos.audit_entries(ADMIN, "c").items[0]
    assert (entry.action, entry.subject) == ("memory.erase", memory.id)
    assert entry.details["text_hmac_sha256"] == [
        hmac.new(KEY, text, hashlib.sha256).hexdigest() for text in (b"first", b"second")
    ]
    assert desk.mos.verify_audit().ok


def test_erasing_hands_back_every_artifact_of_the_cube_and_leaves_it_stale(desk: Desk) -> None:
    one, _two = desk.add("one", "two")
    desk.promote()
    desk.run_jobs()
    artifacts = desk.mos.list_artifacts("c")
    erased = desk.mos.erase_memory(ADMIN, "c", one.id, tombstone_key=KEY)
    assert erased.artifacts == artifacts != []
    assert desk.mos.list_artifacts("c") == []
    assert desk.state() == "stale"
    assert [memory.text for memory in desk.shot().memories] == ["two"]


def test_an_archived_memory_can_be_erased(desk: Desk) -> None:
    (memory,) = desk.add("one")
    desk.mos.archive_memory(ADMIN, "c", memory.id)
    assert desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY).versions == 2


def test_erasing_empties_the_stored_replies_that_name_the_memory(desk: Desk) -> None:
    (memory,) = desk.add("one")
    body = f'{{"id": "{memory.id}", "text": "{WORDS[0]}"}}'.encode()
    desk.mos.store_reply(ADMIN, "k1", "digest-1", 201, body)
    desk.mos.store_reply(ADMIN, "k2", "digest-2", 201, b'{"id": "other"}')
    desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY)
    assert WORDS[0].encode() not in desk.stored_bytes()
    assert b"digest-1" not in desk.stored_bytes()
    # Repeating the request must not bring the memory back.
    with pytest.raises(Conflict, match="erased"):
        desk.mos.idempotent_reply(ADMIN, "k1", "digest-1")
    assert desk.mos.idempotent_reply(ADMIN, "k2", "digest-2") is not None


def test_erasing_without_a_key_is_refused_before_anything_is_lost(desk: Desk) -> None:
    (memory,) = desk.add("one")
    with pytest.raises(ConfigurationError):
        desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=b"")
    assert desk.mos.get_memory(ADMIN, "c", memory.id) == memory


@pytest.mark.parametrize("more", [0, 20])
def test_only_replies_that_name_what_was_erased_are_emptied(desk: Desk, more: int) -> None:
    # Few names are looked for by the database, many by us.
    names = ["mem_a", *[f"mem_{number}" for number in range(more)]]
    desk.mos.store_reply(ADMIN, "k1", "d", 201, b'{"data": [{"id": "mem_a"}]}')
    desk.mos.store_reply(ADMIN, "k2", "d", 201, b'{"id": "mem_ab", "text": "mem_a"}')
    desk.mos.store_reply(ADMIN, "k3", "d", 201, b'{"id": "mem_b", "text": "of mem_a"}')
    with desk.mos._catalog.write() as session:
        assert forget_replies(session, naming=names) == 2
    # A text that is nothing but the id counts as naming it.
    for key in ("k1", "k2"):
        with pytest.raises(Conflict, match="erased"):
            desk.mos.idempotent_reply(ADMIN, key, "d")
    assert desk.mos.idempotent_reply(ADMIN, "k3", "d") is not None


def test_an_erase_queues_its_job_with_it_and_the_rewrite_looks_at_every_table(desk: Desk) -> None:
    (memory,) = desk.add(f"the word is {WORDS[0]}", tags=("t",))
    erased = desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY)
    job = desk.mos.get_job(ADMIN, erased.job)
    assert (job.kind, job.state, job.created_by) == (JobKind.ERASE, JobState.QUEUED, ADMIN.id)
    order = order_of(job)
    assert [name for _, name in order.memories] == [memory.id]
    assert order.scopes == (("c", 1),)
    assert order.counts[Removed.TEXT] == 1
    assert WORDS[0] not in str(job.payload)
    assert desk.mos.traces_of(job.id, order) == {}
    assert desk.mos.rewrite_files(order.entry)
    if desk.database.name != "sqlite":
        vacuumed = desk.sql("SELECT relname FROM pg_stat_user_tables WHERE vacuum_count > 0")
        names = {name for (name,) in vacuumed}
        assert {"memories", "memory_versions", "memory_vectors", "idempotency"} <= names
        assert "PostgreSQL's own log" in desk.mos.rewrites_how


def test_traces_of_a_memory_that_is_there_are_found_in_every_table_that_has_them(
    desk: Desk,
) -> None:
    (memory, _other) = desk.add("one", "two", tags=("t",))
    desk.mos.store_reply(ADMIN, "k", "d", 201, f'{{"id": "{memory.id}"}}'.encode())
    (seq,) = desk.sql(f"SELECT seq FROM memories WHERE id = '{memory.id}'")[0]
    order = ErasureOrder(((seq, memory.id),), (), 0)
    found = desk.mos.traces_of("job_1", order)
    assert found == {"memories": 2, "memory_versions": 1, "memory_tags": 1, "idempotency": 1}
