"""Merging memories, and erasing what was derived from others."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from catalog_kit import ADMIN, KEY, START, Desk, open_desk
from databases import Database

from memos_vllm.domain.access import Role
from memos_vllm.domain.fact import NewFact
from memos_vllm.domain.memory import Edge, MemoryState
from memos_vllm.domain.turn import NewTurn
from memos_vllm.errors import Conflict, InvalidRequest, NotFound, TooLarge


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database) as opened:
        yield opened


def test_a_merge_keeps_the_parents_with_lineage_both_ways(desk: Desk) -> None:
    one, two = desk.add("Refunds take five days.", "Refunds take a working week.")
    new = desk.mos.merge_memories(ADMIN, "c", [two.id, one.id], reason="they say the same")
    assert new.text == "Refunds take a working week.\nRefunds take five days."
    assert (new.state, new.version, new.source.kind) == (MemoryState.ACTIVE, 1, "merge")
    assert set(new.lineage.derived_from) == {one.id, two.id}
    for parent in (one, two):
        now = desk.mos.get_memory(ADMIN, "c", parent.id)
        assert (now.state, now.version, now.text) == (MemoryState.MERGED, 2, parent.text)
        assert now.lineage.merged_into == new.id
        newest = desk.mos.memory_history(ADMIN, "c", parent.id)[-1]
        assert (newest.change, newest.reason) == ("merged", "they say the same")
    entry = desk.mos.audit_entries(ADMIN, "c").items[0]
    assert (entry.action, entry.subject) == ("memory.merge", new.id)
    assert entry.details["parents"] == [two.id, one.id]
    assert desk.mos.verify_audit().ok


def test_what_is_merged_is_seen_by_no_one_who_did_not_see_every_part(desk: Desk) -> None:
    (red,) = desk.add("red", labels=("red",), tags=("a",))
    (blue,) = desk.add("blue", labels=("blue",), tags=("b", "a"))
    new = desk.mos.merge_memories(ADMIN, "c", [red.id, blue.id], text="violet")
    assert (set(new.labels), set(new.tags), new.text) == ({"red", "blue"}, {"a", "b"}, "violet")
    reader = desk.grant("reader", Role.READER, labels=["red"])
    with pytest.raises(NotFound):
        desk.mos.get_memory(reader, "c", new.id)
    assert desk.mos.get_memory(reader, "c", red.id).lineage.merged_into is None


def test_a_merge_expires_with_its_first_part_and_leads_where_they_led(desk: Desk) -> None:
    (end,) = desk.add("end")
    (one,) = desk.add("one", edges=(Edge("cites", end.id, 0.5),), expires_at=START + timedelta(9))
    (two,) = desk.add(
        "two",
        edges=(Edge("cites", end.id, 0.9), Edge("next", one.id)),
        expires_at=START + timedelta(5),
    )
    new = desk.mos.merge_memories(ADMIN, "c", [one.id, two.id])
    assert new.edges == (Edge("cites", end.id, 0.9),)
    assert new.expires_at == START + timedelta(5)


def test_a_restored_part_is_no_longer_merged_into_anything(desk: Desk) -> None:
    one, two = desk.add("one", "two")
    new = desk.mos.merge_memories(ADMIN, "c", [one.id, two.id])
    restored = desk.mos.restore_memory(ADMIN, "c", one.id)
    assert (restored.state, restored.lineage.merged_into) == (MemoryState.ACTIVE, None)
    assert one.id in desk.mos.get_memory(ADMIN, "c", new.id).lineage.derived_from
    again = desk.mos.merge_memories(ADMIN, "c", [one.id, new.id])
    assert desk.mos.get_memory(ADMIN, "c", one.id).lineage.merged_into == again.id


def test_a_merge_that_makes_no_sense_changes_nothing(desk: Desk) -> None:
    one, two, gone = desk.add("one", "x" * 60_000, "y" * 60_000)
    desk.mos.archive_memory(ADMIN, "c", gone.id)
    desk.mos.create_cube(ADMIN, cube_id="other")
    (foreign,) = desk.add("foreign", cube_id="other")
    before = desk.sql("SELECT id, state, version FROM memories ORDER BY seq")
    for ids, error in (
        ([], InvalidRequest),
        ([one.id], InvalidRequest),
        ([one.id, one.id], InvalidRequest),
        ([one.id] * 300, InvalidRequest),
        ([one.id, "mem_none"], NotFound),
        ([one.id, foreign.id], NotFound),
        ([one.id, gone.id], Conflict),
    ):
        with pytest.raises(error):
            desk.mos.merge_memories(ADMIN, "c", ids)
    with pytest.raises(InvalidRequest):
        desk.mos.merge_memories(ADMIN, "c", [one.id, two.id], text=" ")
    (more,) = desk.add("z" * 60_000)
    with pytest.raises(TooLarge):
        desk.mos.merge_memories(ADMIN, "c", [two.id, more.id])
    assert desk.sql("SELECT id, state, version FROM memories ORDER BY seq")[:-1] == before


def test_erasing_takes_along_what_was_derived_over_any_number_of_steps(desk: Desk) -> None:
    secret, plain, kept = desk.add("quicksilver one", "plain two", "kept three")
    first = desk.mos.merge_memories(ADMIN, "c", [secret.id, plain.id])
    second = desk.mos.merge_memories(ADMIN, "c", [first.id, kept.id])
    erased = desk.mos.erase_memory(ADMIN, "c", secret.id, tombstone_key=KEY)
    assert set(erased.derived) == {first.id, second.id}
    for memory in (secret, first, second):
        with pytest.raises(NotFound):
            desk.mos.get_memory(ADMIN, "c", memory.id)
    assert b"quicksilver" not in desk.stored_bytes()
    # What they were made of besides is there still, and can be restored.
    assert desk.mos.restore_memory(ADMIN, "c", kept.id).text == "kept three"
    subjects = {
        entry.subject: entry.details.get("derived_from")
        for entry in desk.mos.audit_entries(ADMIN, "c").items
        if entry.action == "memory.erase"
    }
    assert subjects == {secret.id: None, first.id: secret.id, second.id: secret.id}
    assert desk.mos.verify_audit().ok


def test_erasing_a_turn_takes_the_facts_read_out_of_it(desk: Desk) -> None:
    (turn,) = desk.mos.add_turns(ADMIN, "c", [NewTurn("user", "I moved to York.")])
    (fact,) = desk.mos.add_facts(ADMIN, "c", [NewFact("Ada lives in York.")], turn_ids=[turn.id])
    erased = desk.mos.erase_memory(ADMIN, "c", turn.id, tombstone_key=KEY)
    assert erased.derived == (fact.id,)
    assert b"York" not in desk.stored_bytes()


def test_who_may_not_see_what_was_derived_is_not_told_of_it_and_it_goes_all_the_same(
    desk: Desk,
) -> None:
    open_one, red = desk.add("one")[0], desk.add("two", labels=("red",))[0]
    new = desk.mos.merge_memories(ADMIN, "c", [open_one.id, red.id])
    editor = desk.grant("editor", Role.EDITOR)
    assert desk.mos.erase_memory(editor, "c", open_one.id, tombstone_key=KEY).derived == ()
    with pytest.raises(NotFound):
        desk.mos.get_memory(ADMIN, "c", new.id)
