"""Erasing: nothing of the text is left in any file of the catalog."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from pathlib import Path

import pytest
from catalog_kit import ADMIN, KEY, Desk, open_desk

from memos_vllm.domain.memory import Edge, MemoryPatch, Source, Tier
from memos_vllm.errors import ConfigurationError, Conflict, NotFound

WORDS = ("quicksilver", "brimstone", "vitriol")


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with open_desk(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize("length", [1, 5000])
def test_no_version_tag_title_or_reason_of_an_erased_memory_is_on_the_disk(
    desk: Desk, length: int
) -> None:
    (memory,) = desk.add(f"{WORDS[0]} " * length, tags=(WORDS[1],), source=Source(title=WORDS[2]))
    desk.mos.update_memory(ADMIN, "c", memory.id, MemoryPatch(text="new", reason=WORDS[0]))
    (kept,) = desk.add("kept text", edges=(Edge("next", memory.id),))
    assert all(word.encode() in desk.bytes_on_disk() for word in WORDS)
    erased = desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY)
    assert (erased.versions, erased.epoch, erased.log_truncated) == (2, 2, True)
    left = desk.bytes_on_disk()
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
    assert WORDS[0].encode() not in desk.bytes_on_disk()
    assert b"digest-1" not in desk.bytes_on_disk()
    # Repeating the request must not bring the memory back.
    with pytest.raises(Conflict, match="erased"):
        desk.mos.idempotent_reply(ADMIN, "k1", "digest-1")
    assert desk.mos.idempotent_reply(ADMIN, "k2", "digest-2") is not None


def test_erasing_without_a_key_is_refused_before_anything_is_lost(desk: Desk) -> None:
    (memory,) = desk.add("one")
    with pytest.raises(ConfigurationError):
        desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=b"")
    assert desk.mos.get_memory(ADMIN, "c", memory.id) == memory


def test_an_erased_text_is_not_kept_by_this_process(desk: Desk) -> None:
    (memory,) = desk.add("one")
    desk.mos.promote(ADMIN, "c", to=Tier.ACTIVATION)
    desk.shot()
    desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY)
    assert "c" not in desk.mos._snapshots


def test_a_reader_that_holds_on_to_the_log_is_reported_and_the_erasure_stands(
    tmp_path: Path,
) -> None:
    from memos_vllm.control.catalog import Catalog

    with open_desk(tmp_path) as desk:
        (memory,) = desk.add(WORDS[0])
        desk.mos.close()
        impatient = Catalog.open(desk.url, busy_timeout_seconds=0.05)
        desk.mos._catalog = impatient
        with impatient.engine.connect() as reader:
            reader.exec_driver_sql("SELECT * FROM memories").all()
            erased = desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY)
        assert not erased.log_truncated
        with pytest.raises(NotFound):
            desk.mos.get_memory(ADMIN, "c", memory.id)
        assert impatient.scrub()
        assert WORDS[0].encode() not in desk.bytes_on_disk()
