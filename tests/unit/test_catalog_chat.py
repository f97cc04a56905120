"""Snapshots, artifacts and usage: what a chat reads and leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from catalog_kit import ADMIN, KEY, Desk, open_desk
from databases import Database

from memos_vllm.control.mos import CubePatch, UsageEvent
from memos_vllm.domain.ids import CubeId, MemoryId
from memos_vllm.domain.memory import MemoryPatch, Source
from memos_vllm.errors import Conflict, NotFound


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database) as opened:
        yield opened


def test_a_snapshot_has_what_a_chat_needs_in_the_order_asked_for(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="d", name="Domain", preamble="Be brief.")
    desk.add("one", cube_id="d", source=Source(uri="https://e.org", title="T"))
    desk.promote(cube_id="d")
    first, second, third = desk.mos.snapshots(ADMIN, ["d", "c", "d"])
    assert (first.id, second.id) == ("d", "c")
    assert third == first
    assert (first.name, first.preamble, first.version, first.epoch) == (
        "Domain",
        "Be brief.",
        3,
        1,
    )
    (memory,) = first.memories
    assert (memory.text, memory.title, memory.source_uri) == ("one", "T", "https://e.org")
    assert desk.mos.snapshots(ADMIN, []) == []


@pytest.mark.parametrize("cube_id", ["nope", "a/b", "\ud800"])
def test_one_unknown_cube_in_a_list_is_not_found(desk: Desk, cube_id: str) -> None:
    with pytest.raises(NotFound):
        desk.mos.snapshots(ADMIN, ["c", cube_id])


def test_a_cached_snapshot_is_never_older_than_the_catalog(desk: Desk) -> None:
    (memory,) = desk.add("one")
    desk.promote()
    assert desk.shot() == desk.shot()
    # Another process changes the cube.
    other = Desk(desk.url, desk.clock, desk.database)
    other.mos.update_memory(ADMIN, "c", memory.id, MemoryPatch(text="two"))
    assert [one.text for one in desk.shot().memories] == ["two"]
    other.mos.update_cube(ADMIN, "c", CubePatch(name="N", preamble="P"))
    assert (desk.shot().name, desk.shot().preamble) == ("N", "P")
    other.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY)
    assert desk.shot().memories == ()
    other.mos.delete_cube(ADMIN, "c")
    with pytest.raises(NotFound):
        desk.shot()
    other.mos.close()


def test_an_unchanged_cube_costs_a_chat_one_select(desk: Desk) -> None:
    from sqlalchemy import event

    desk.add("one")
    desk.promote()
    version = desk.shot().version
    statements: list[str] = []
    event.listen(
        desk.mos._catalog.engine,
        "before_cursor_execute",
        lambda *call: statements.append(call[2]),
    )
    assert desk.mos.changed_snapshots(ADMIN, ["c"], known={"c": version}) == [None]
    # PostgreSQL's driver begins on its own.
    assert [word for word in (one.split()[0] for one in statements) if word != "BEGIN"] == [
        "SELECT"
    ]


def test_an_artifact_recorded_twice_is_one_artifact_with_the_later_state(desk: Desk) -> None:
    desk.add("one")
    desk.promote()
    record = desk.artifact()
    desk.mos.record_artifact(record)
    desk.mos.record_artifact(replace(record, bytes=1))
    assert desk.mos.list_artifacts() == [replace(record, bytes=1)]
    actions = [entry.action for entry in desk.mos.audit_entries(ADMIN).items]
    assert actions.count("artifact.record") == 1


def test_an_artifact_of_what_is_gone_is_refused_so_that_its_file_is_removed(desk: Desk) -> None:
    (memory,) = desk.add("one")
    desk.promote()
    record = desk.artifact()
    desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY)
    with pytest.raises(NotFound, match=memory.id):
        desk.mos.record_artifact(record)
    desk.mos.delete_cube(ADMIN, "c")
    with pytest.raises(NotFound, match="memcube 'c'"):
        desk.mos.record_artifact(record)


def test_an_artifact_cannot_change_its_cube(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="d")
    desk.add("one")
    desk.promote()
    record = desk.artifact()
    desk.mos.record_artifact(record)
    with pytest.raises(Conflict):
        desk.mos.record_artifact(replace(record, cube_id=CubeId("d"), memory_versions=()))


def test_a_forgotten_artifact_leaves_the_cube_stale(desk: Desk) -> None:
    desk.add("one")
    desk.promote()
    desk.run_jobs()
    (record,) = desk.mos.list_artifacts("c")
    assert desk.mos.forget_artifacts([record.id, "unknown"]) == 1
    assert desk.state() == "stale"
    assert desk.mos.list_artifacts() == []


def test_usage_adds_up_moves_no_version_and_skips_what_is_gone(desk: Desk) -> None:
    one, two = desk.add("one", "two")
    version = desk.mos.get_cube(ADMIN, "c").version
    at = desk.clock.now

    def event(*ids: str) -> UsageEvent:
        return UsageEvent(CubeId("c"), tuple(MemoryId(one) for one in ids), 9, 3, "resident", at)

    desk.mos.record_usage([event(one.id, two.id), event(one.id, "mem_gone")])
    desk.mos.record_usage([event(one.id)])
    desk.mos.record_usage([])
    hits = [memory.usage.hits for memory in desk.mos.list_memories(ADMIN, "c").items]
    assert hits == [3, 1]
    assert desk.mos.get_cube(ADMIN, "c").version == version
    assert desk.mos.cube_stats(ADMIN, "c").prefill_tokens_saved == 9


def test_readers_see_whole_versions_while_a_writer_moves_the_cube(desk: Desk) -> None:
    ids = [memory.id for memory in desk.add("0", "0")]
    desk.promote()
    stop = threading.Event()
    torn: list[object] = []

    def read() -> None:
        while not stop.is_set():
            shot = desk.shot()
            if [one.version for one in shot.memories] != [shot.memories[0].version] * 2:
                # Versions differ by one only between the two halves of a pair of writes.
                gap = shot.memories[0].version - shot.memories[1].version
                if gap not in (0, 1):
                    torn.append(shot)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 13):
        for memory_id in ids:
            desk.mos.update_memory(ADMIN, "c", memory_id, MemoryPatch(text=str(number)))
    stop.set()
    for thread in threads:
        thread.join()
    assert torn == []
