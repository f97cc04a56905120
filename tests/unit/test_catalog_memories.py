"""Memories in the catalog."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from catalog_kit import ADMIN, Desk, open_desk
from databases import Database
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memos_vllm.domain.memory import (
    Edge,
    MemoryPatch,
    MemoryState,
    NewMemory,
    Source,
    Tier,
)
from memos_vllm.errors import Conflict, InvalidRequest, NotFound, StaleVersion


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database) as opened:
        yield opened


def test_a_memory_comes_back_as_it_was_given(desk: Desk) -> None:
    (target,) = desk.add("target")
    source = Source("web", "https://e.org/a", "Title", "Ann", datetime.now(UTC), "p. 3")
    given_memory = NewMemory(
        text="  Refunds\r\ntake five days. 日本 🦊 ",
        tags=("refunds", "é"),
        source=source,
        edges=(Edge("part-of", target.id, 0.5), Edge("next", target.id)),
        labels=("hr",),
        metadata={"a": [1, None, {"b": 0.25}]},
        expires_at=datetime(2030, 1, 1, 12, 30, 0, 1, tzinfo=UTC),
    )
    (stored,) = desk.mos.add_memories(ADMIN, "c", [given_memory], reason="told so")
    desk.reopen()
    read = desk.mos.get_memory(ADMIN, "c", stored.id)
    assert read == stored
    for name in ("text", "tags", "source", "edges", "labels", "metadata", "expires_at"):
        assert getattr(read, name) == getattr(given_memory, name), name
    assert (read.state, read.tier, read.version) == ("active", "plaintext", 1)
    assert (read.created_by, read.created_at) == ("local", desk.clock.now)


@settings(
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_any_text_that_is_accepted_is_stored_exactly(desk: Desk, text: str) -> None:
    if not text.strip():
        return
    (stored,) = desk.add(text)
    assert desk.mos.get_memory(ADMIN, "c", stored.id).text == text


def test_one_bad_memory_in_a_batch_leaves_nothing_behind(desk: Desk) -> None:
    before = desk.mos.get_cube(ADMIN, "c")
    good = NewMemory("fine")
    with pytest.raises(InvalidRequest, match=r"memories\[1\].text"):
        desk.mos.add_memories(ADMIN, "c", [good, NewMemory(" ")])
    with pytest.raises(NotFound, match="mem_nowhere"):
        desk.mos.add_memories(ADMIN, "c", [good, NewMemory("x", edges=(Edge("n", "mem_nowhere"),))])
    assert desk.mos.get_cube(ADMIN, "c") == before
    assert desk.mos.verify_audit().entries == 1


def test_an_edge_cannot_leave_its_cube(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="other")
    (foreign,) = desk.add("foreign", cube_id="other")
    with pytest.raises(NotFound):
        desk.add("x", edges=(Edge("next", foreign.id),))


def test_a_memory_is_not_found_through_another_cube(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="other")
    (memory,) = desk.add("here")
    for memory_id in (memory.id, "mem_x", "a/b", "\ud800"):
        with pytest.raises(NotFound):
            desk.mos.get_memory(ADMIN, "other", memory_id)


def test_lists_filter_by_state_tier_tag_and_text_and_keep_the_order_of_adding(desk: Desk) -> None:
    one, two, three = desk.add("Ärger im Büro", "50% off_now", "plain", tags=("t",))
    (four,) = desk.add("untagged")
    desk.promote(two.id)
    desk.mos.archive_memory(ADMIN, "c", three.id)

    def found(**filters: object) -> list[str]:
        return [memory.id for memory in desk.mos.list_memories(ADMIN, "c", **filters).items]

    assert found() == [one.id, two.id, three.id, four.id]
    assert found(tag="t") == [one.id, two.id, three.id]
    assert found(state=MemoryState.ARCHIVED) == [three.id]
    assert found(tier=Tier.ACTIVATION) == [two.id]
    assert found(query="äRGER") == [one.id]
    assert found(query="50% OFF_") == [two.id]
    assert found(query="5%o") == []
    assert found(query="plain", tag="t", state=MemoryState.ACTIVE) == []


def test_pages_of_memories_follow_on_from_each_other(desk: Desk) -> None:
    ids = [memory.id for memory in desk.add(*(f"m{number}" for number in range(5)))]
    seen: list[str] = []
    cursor = None
    while True:
        page = desk.mos.list_memories(ADMIN, "c", limit=2, cursor=cursor)
        seen += [memory.id for memory in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == ids


def test_a_change_makes_a_version_that_history_keeps_with_who_when_and_why(desk: Desk) -> None:
    (memory,) = desk.add("first", tags=("a",))
    desk.clock.advance(5)
    patch = MemoryPatch(text="second", tags=("b",), reason="a typo")
    changed = desk.mos.update_memory(ADMIN, "c", memory.id, patch, if_match=1)
    assert (changed.text, changed.tags, changed.version) == ("second", ("b",), 2)
    assert changed.updated_at == desk.clock.now > changed.created_at
    assert desk.mos.list_memories(ADMIN, "c", tag="a").items == []
    old, new = desk.mos.memory_history(ADMIN, "c", memory.id)
    assert (old.version, old.text, old.change, old.tags) == (1, "first", "added", ("a",))
    assert (new.version, new.text, new.change, new.reason) == (2, "second", "edited", "a typo")
    assert (new.changed_by, new.changed_at) == ("local", desk.clock.now)


def test_a_change_that_changes_nothing_makes_no_version(desk: Desk) -> None:
    (memory,) = desk.add("same", tags=("a",))
    version = desk.mos.get_cube(ADMIN, "c").version
    patch = MemoryPatch(text="same", tags=("a",), metadata={}, source=Source(), edges=())
    assert desk.mos.update_memory(ADMIN, "c", memory.id, patch) == memory
    assert desk.mos.get_cube(ADMIN, "c").version == version


def test_every_field_can_be_changed_and_emptied(desk: Desk) -> None:
    target, memory = desk.add("target", "text")
    full = MemoryPatch(
        source=Source(title="T"),
        edges=(Edge("next", target.id),),
        metadata={"k": 1},
        expires_at=datetime(2030, 1, 1, tzinfo=UTC),
    )
    changed = desk.mos.update_memory(ADMIN, "c", memory.id, full)
    assert changed.edges == full.edges
    assert (changed.source, changed.metadata) == (full.source, {"k": 1})
    assert changed.expires_at == full.expires_at
    emptied = desk.mos.update_memory(
        ADMIN, "c", memory.id, MemoryPatch(edges=(), metadata={}, expires_at=None)
    )
    assert (emptied.edges, emptied.metadata, emptied.expires_at) == ((), {}, None)
    with pytest.raises(InvalidRequest, match="itself"):
        desk.mos.update_memory(ADMIN, "c", memory.id, MemoryPatch(edges=(Edge("next", memory.id),)))


def test_a_stale_if_match_changes_nothing(desk: Desk) -> None:
    (memory,) = desk.add("text")
    calls = [
        lambda: desk.mos.update_memory(ADMIN, "c", memory.id, MemoryPatch(text="x"), if_match=9),
        lambda: desk.mos.archive_memory(ADMIN, "c", memory.id, if_match=9),
        lambda: desk.mos.restore_memory(ADMIN, "c", memory.id, if_match=9),
        lambda: desk.mos.erase_memory(ADMIN, "c", memory.id, if_match=9, tombstone_key=b"k"),
    ]
    for call in calls:
        with pytest.raises(StaleVersion, match="version 9 but the object is at version 1"):
            call()
    assert desk.mos.get_memory(ADMIN, "c", memory.id) == memory


def test_an_archived_memory_can_only_be_restored_and_comes_back_as_it_was(desk: Desk) -> None:
    (memory,) = desk.add("text")
    archived = desk.mos.archive_memory(ADMIN, "c", memory.id, reason="old news")
    assert (archived.state, archived.version) == ("archived", 2)
    assert desk.mos.get_cube(ADMIN, "c").memories.archived == 1
    with pytest.raises(Conflict, match="restore it"):
        desk.mos.update_memory(ADMIN, "c", memory.id, MemoryPatch(text="x"))
    with pytest.raises(Conflict):
        desk.mos.archive_memory(ADMIN, "c", memory.id)
    restored = desk.mos.restore_memory(ADMIN, "c", memory.id)
    assert (restored.state, restored.version, restored.text) == ("active", 3, "text")
    with pytest.raises(Conflict):
        desk.mos.restore_memory(ADMIN, "c", memory.id)
    changes = [one.change for one in desk.mos.memory_history(ADMIN, "c", memory.id)]
    assert changes == ["added", "archived", "restored"]


def test_every_change_of_a_memory_moves_the_version_of_its_cube(desk: Desk) -> None:
    versions = [desk.mos.get_cube(ADMIN, "c").version]

    def note() -> None:
        versions.append(desk.mos.get_cube(ADMIN, "c").version)

    (memory,) = desk.add("text")
    note()
    desk.mos.update_memory(ADMIN, "c", memory.id, MemoryPatch(text="x"))
    note()
    desk.promote()
    note()
    desk.mos.archive_memory(ADMIN, "c", memory.id)
    note()
    desk.mos.restore_memory(ADMIN, "c", memory.id)
    note()
    desk.mos.demote(ADMIN, "c", from_tier=Tier.ACTIVATION)
    note()
    desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=b"k")
    note()
    assert versions == list(range(1, 9))
