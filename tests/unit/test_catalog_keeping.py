"""What is worth keeping of one cube goes over into another, with lineage."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from catalog_kit import ADMIN, Desk, open_desk

from memos_vllm.domain.access import Principal
from memos_vllm.domain.ids import PrincipalId
from memos_vllm.domain.memory import Memory, MemoryState
from memos_vllm.errors import Conflict, InvalidRequest, NotFound

ANN = Principal(PrincipalId("ann"))
KEY = b"k" * 32


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with open_desk(tmp_path) as opened:
        opened.mos.create_cube(ADMIN, cube_id="user.ann")
        yield opened


def keep(desk: Desk, *memories: Memory) -> list[Memory]:
    ids = [memory.id for memory in memories] or None
    return desk.mos.keep_memories(ADMIN, "user.ann", from_cube="c", memory_ids=ids)


def test_what_is_kept_says_the_same_and_names_its_origin(desk: Desk) -> None:
    origins = desk.add("Ann likes tea.", "Ann lives in Leeds.", tags=("a",), labels=("hr",))
    kept = keep(desk, *origins)
    assert [(one.text, one.tags, one.labels) for one in kept] == [
        (one.text, one.tags, one.labels) for one in origins
    ]
    assert [one.lineage.derived_from for one in kept] == [(one.id,) for one in origins]
    assert {one.cube_id for one in kept} == {"user.ann"}
    assert [desk.mos.get_memory(ADMIN, "c", one.id) for one in origins] == origins
    assert desk.mos.verify_audit().ok


def test_keeping_again_adds_only_what_is_new(desk: Desk) -> None:
    desk.add("one")
    first = keep(desk)
    version = desk.mos.get_cube(ADMIN, "user.ann").version
    assert keep(desk) == first
    assert desk.mos.get_cube(ADMIN, "user.ann").version == version
    desk.add("two")
    assert [one.text for one in keep(desk)] == ["one", "two"]
    assert len(desk.mos.list_memories(ADMIN, "user.ann").items) == 2


def test_what_a_cube_says_already_gets_the_new_origin_and_no_double(desk: Desk) -> None:
    (known,) = desk.add("Ann likes tea.", cube_id="user.ann")
    origins = desk.add("Ann likes tea.", "Ann likes tea.")
    (kept,) = keep(desk)
    assert kept.id == known.id
    assert set(kept.lineage.derived_from) == {one.id for one in origins}


def test_the_same_words_under_a_label_are_another_memory(desk: Desk) -> None:
    (known,) = desk.add("Ann likes tea.", cube_id="user.ann")
    desk.add("Ann likes tea.", labels=("hr",))
    (kept,) = keep(desk)
    assert kept.id != known.id
    assert kept.labels == ("hr",)


def test_erasing_the_origin_erases_what_was_kept_of_it(desk: Desk) -> None:
    origin, other = desk.add("secret", "harmless")
    kept, left = keep(desk, origin, other)
    desk.mos.erase_memory(ADMIN, "c", origin.id, tombstone_key=KEY)
    with pytest.raises(NotFound):
        desk.mos.get_memory(ADMIN, "user.ann", kept.id)
    assert desk.mos.get_memory(ADMIN, "user.ann", left.id).text == "harmless"


def test_only_who_reads_the_one_and_writes_the_other_may_keep(desk: Desk) -> None:
    desk.add("one")
    desk.mos.create_cube(ANN, cube_id="hers")
    for target, origin in (("hers", "c"), ("c", "hers")):
        with pytest.raises(NotFound):
            desk.mos.keep_memories(ANN, target, from_cube=origin, memory_ids=None)


def test_what_cannot_be_kept_is_refused_and_nothing_changes(desk: Desk) -> None:
    active, archived = desk.add("one", "two")
    desk.mos.archive_memory(ADMIN, "c", archived.id)
    with pytest.raises(Conflict):
        keep(desk, active, archived)
    with pytest.raises(InvalidRequest):
        desk.mos.keep_memories(ADMIN, "c", from_cube="c", memory_ids=None)
    with pytest.raises(NotFound):
        desk.mos.keep_memories(ADMIN, "user.ann", from_cube="c", memory_ids=["mem_none"])
    assert desk.mos.list_memories(ADMIN, "user.ann").items == []
    assert [one.text for one in keep(desk)] == ["one"]
    assert desk.mos.get_memory(ADMIN, "c", archived.id).state is MemoryState.ARCHIVED


def test_what_has_expired_is_neither_kept_nor_taken_for_what_is_said_already(desk: Desk) -> None:
    soon = desk.clock.now + timedelta(seconds=5)
    desk.mos.create_cube(ADMIN, cube_id="short")
    (brief,) = desk.add("Back at five.", cube_id="short", expires_at=soon)
    (first,) = desk.mos.keep_memories(ADMIN, "c", from_cube="short", memory_ids=[brief.id])
    (lasting,) = desk.add("Back at five.", cube_id="short")
    desk.clock.advance(10)

    with pytest.raises(Conflict, match="archived"):
        desk.mos.keep_memories(ADMIN, "c", from_cube="short", memory_ids=[brief.id])
    (second,) = desk.mos.keep_memories(ADMIN, "c", from_cube="short", memory_ids=None)

    assert second.id != first.id
    assert second.lineage.derived_from == (lasting.id,)
