"""Cubes in the catalog."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from catalog_kit import ADMIN, Desk, open_desk
from databases import Database

from memos_vllm.control.mos import CubePatch, UsageEvent
from memos_vllm.domain.memory import Tier
from memos_vllm.errors import Conflict, InvalidRequest, NotFound, StaleVersion


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database, cube=False) as opened:
        yield opened


def test_a_new_cube_has_version_1_its_id_for_a_name_and_no_memory(desk: Desk) -> None:
    cube = desk.mos.create_cube(ADMIN, cube_id="acme", labels=["hr"])
    assert (cube.id, cube.name, cube.version, cube.epoch) == ("acme", "acme", 1, 1)
    assert (cube.owner, cube.labels) == ("local", ("hr",))
    assert cube.memories.active == 0
    assert cube.activation.state == "none"
    assert desk.mos.get_cube(ADMIN, "acme") == cube


def test_a_cube_without_id_gets_a_legal_one(desk: Desk) -> None:
    made = desk.mos.create_cube(ADMIN)
    assert desk.mos.get_cube(ADMIN, made.id) == made


def test_an_id_that_is_taken_is_a_conflict_and_changes_nothing(desk: Desk) -> None:
    first = desk.mos.create_cube(ADMIN, cube_id="acme", name="first")
    with pytest.raises(Conflict, match="acme"):
        desk.mos.create_cube(ADMIN, cube_id="acme", name="second")
    assert desk.mos.get_cube(ADMIN, "acme") == first


@pytest.mark.parametrize("cube_id", ["nope", "a/b", "", "\ud800", "x" * 500])
def test_an_unknown_or_impossible_id_is_not_found(desk: Desk, cube_id: str) -> None:
    with pytest.raises(NotFound):
        desk.mos.get_cube(ADMIN, cube_id)


def test_pages_show_every_cube_once_in_order_while_others_come_and_go(desk: Desk) -> None:
    for number in range(7):
        desk.mos.create_cube(ADMIN, cube_id=f"c{number}")
    first = desk.mos.list_cubes(ADMIN, limit=3)
    assert [cube.id for cube in first.items] == ["c0", "c1", "c2"]
    desk.mos.delete_cube(ADMIN, "c2")
    desk.mos.create_cube(ADMIN, cube_id="b")
    second = desk.mos.list_cubes(ADMIN, limit=3, cursor=first.next_cursor)
    assert [cube.id for cube in second.items] == ["c3", "c4", "c5"]
    last = desk.mos.list_cubes(ADMIN, limit=3, cursor=second.next_cursor)
    assert [cube.id for cube in last.items] == ["c6"]
    assert last.next_cursor is None


def test_a_last_page_that_is_full_has_no_cursor(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="a")
    desk.mos.create_cube(ADMIN, cube_id="b")
    assert desk.mos.list_cubes(ADMIN, limit=2).next_cursor is None


@pytest.mark.parametrize(
    "cursor", ["", "x", "é", "A" * 999, "bWVtb3JpZXM6MQ", "Y3ViZXM6", "Y3ViZXM6AA"]
)
def test_a_cursor_of_another_list_or_of_nothing_is_refused(desk: Desk, cursor: str) -> None:
    with pytest.raises(InvalidRequest, match="cursor"):
        desk.mos.list_cubes(ADMIN, limit=5, cursor=cursor)


@pytest.mark.parametrize("limit", [0, -1, 1001])
def test_a_limit_outside_1_to_1000_is_refused(desk: Desk, limit: int) -> None:
    with pytest.raises(InvalidRequest, match="limit"):
        desk.mos.list_cubes(ADMIN, limit=limit)


def test_a_change_moves_the_version_and_no_change_does_not(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="c", name="old")
    changed = desk.mos.update_cube(ADMIN, "c", CubePatch(name="new"), if_match=1)
    assert (changed.name, changed.version, changed.epoch) == ("new", 2, 1)
    same = desk.mos.update_cube(ADMIN, "c", CubePatch(name="new"))
    assert same.version == 2
    with pytest.raises(StaleVersion):
        desk.mos.update_cube(ADMIN, "c", CubePatch(name="newer"), if_match=1)
    assert desk.mos.get_cube(ADMIN, "c").name == "new"


def test_labels_move_the_epoch(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="c")
    changed = desk.mos.update_cube(ADMIN, "c", CubePatch(labels=("hr",)))
    assert (changed.epoch, changed.labels) == (2, ("hr",))


def test_a_new_preamble_makes_what_was_baked_stale(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="c")
    desk.add("one")
    desk.promote()
    desk.run_jobs()
    assert desk.state() == "ready"
    desk.mos.update_cube(ADMIN, "c", CubePatch(name="another name"))
    assert desk.state() == "ready"
    desk.mos.update_cube(ADMIN, "c", CubePatch(preamble="Be brief."))
    assert desk.state() == "stale"


def test_a_deleted_cube_takes_everything_along_and_names_its_artifacts(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="c")
    desk.add("the secret ingredient", tags=("t",), labels=())
    desk.promote()
    desk.run_jobs()
    with pytest.raises(StaleVersion):
        desk.mos.delete_cube(ADMIN, "c", if_match=1)
    deleted = desk.mos.delete_cube(ADMIN, "c")
    assert [record.bytes for record in deleted.artifacts] == [4096]
    for table in ("cubes", "memories", "memory_versions", "memory_tags", "jobs", "artifacts"):
        assert desk.sql(f"SELECT count(*) FROM {table}") == [(0,)], table
    assert b"the secret ingredient" not in desk.stored_bytes()
    with pytest.raises(NotFound):
        desk.mos.get_cube(ADMIN, "c")
    assert desk.mos.audit_entries(ADMIN, "c").items[0].action == "cube.delete"


def test_a_cube_made_again_never_repeats_a_version_or_an_epoch(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="c")
    desk.add("old text")
    desk.promote()
    before = desk.shot()
    desk.mos.delete_cube(ADMIN, "c")
    desk.mos.create_cube(ADMIN, cube_id="c")
    after = desk.shot()
    assert after.version > before.version
    assert after.epoch > before.epoch
    assert after.memories == ()


def test_stats_count_memories_bytes_and_what_chats_saved(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="c")
    baked, _ = desk.add("four", "élan")
    desk.promote(baked.id)
    desk.run_jobs()
    now = desk.clock.now
    desk.mos.record_usage(
        [
            UsageEvent("c", (baked.id,), 100, 96, "resident", now),
            UsageEvent("c", (baked.id,), 100, 0, "computed", now, saved_seconds=0.5),
            UsageEvent("gone", (), 1, 1, "resident", now),
        ]
    )
    stats = desk.mos.cube_stats(ADMIN, "c")
    assert stats.tiers[Tier.PLAINTEXT].text_bytes == 5
    assert stats.tiers[Tier.ACTIVATION].tokens == 100
    assert stats.hits_by_source == {"resident": 1, "computed": 1}
    assert (stats.hits, stats.prefill_tokens_saved, stats.artifacts) == (2, 96, 1)
    assert stats.prefill_seconds_saved == 0.5
    usage = desk.mos.get_memory(ADMIN, "c", baked.id).usage
    assert (usage.hits, usage.last_used_at) == (2, now)
