"""Expiry: over at its moment for everyone, and written down as archived soon after."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from catalog_kit import ADMIN, Desk, open_desk

from memos_vllm.domain.access import Role
from memos_vllm.domain.memory import MemoryPatch, MemoryState, Tier
from memos_vllm.errors import Conflict


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with open_desk(tmp_path) as opened:
        yield opened


def listed(desk: Desk, state: MemoryState | None = None) -> list[str]:
    return [one.text for one in desk.mos.list_memories(ADMIN, "c", state=state).items]


def expiring(desk: Desk, *texts: str, seconds: float = 10, **fields: object) -> list[str]:
    soon = desk.clock.now + timedelta(seconds=seconds)
    return [one.id for one in desk.add(*texts, expires_at=soon, **fields)]


@pytest.mark.parametrize("swept", [False, True])
def test_what_has_expired_counts_as_archived_whether_or_not_it_was_written_down(
    desk: Desk, swept: bool
) -> None:
    (gone,) = expiring(desk, "gone")
    expiring(desk, "labelled", labels=("hr",))
    desk.add("stays")
    desk.promote(gone)
    desk.clock.advance(9.999)
    assert listed(desk, MemoryState.ACTIVE) == ["gone", "labelled", "stays"]
    assert desk.mos.archive_expired() == 0
    desk.clock.advance(0.001)
    if swept:
        assert desk.mos.archive_expired() == 2
    assert listed(desk, MemoryState.ACTIVE) == ["stays"]
    assert listed(desk, MemoryState.ARCHIVED) == ["gone", "labelled"]
    assert desk.mos.get_memory(ADMIN, "c", gone).state is MemoryState.ARCHIVED
    assert desk.shot().memories == ()
    cube = desk.mos.get_cube(ADMIN, "c")
    assert (cube.memories.active, cube.memories.archived) == (1, 2)
    assert (cube.tiers.plaintext, cube.tiers.activation) == (1, 0)
    assert desk.mos.cube_stats(ADMIN, "c").tiers[Tier.PLAINTEXT].memories == 1
    reader = desk.grant("ann", Role.READER)
    assert desk.mos.get_cube(reader, "c").memories.archived == 1
    (other,) = desk.add("x")
    with pytest.raises(Conflict, match="already"):
        desk.mos.archive_memory(ADMIN, "c", gone)
    with pytest.raises(Conflict, match="restore it before you merge it"):
        desk.mos.merge_memories(ADMIN, "c", [gone, other.id])
    with pytest.raises(Conflict, match="restore it before you edit it"):
        desk.mos.update_memory(ADMIN, "c", gone, MemoryPatch(text="y"))


def test_a_sweep_keeps_a_version_a_row_of_the_log_and_tells_the_index(desk: Desk) -> None:
    (gone,) = expiring(desk, "gone")
    desk.clock.advance(3600)
    before = desk.mos.get_cube(ADMIN, "c").version
    newest = desk.mos.newest_change()
    assert desk.mos.archive_expired() == 1
    last = desk.mos.memory_history(ADMIN, "c", gone)[-1]
    assert (last.version, last.change, last.changed_by) == (2, "archived", "system")
    assert last.reason == "expired at 2026-01-01T00:00:10Z"
    entry = desk.mos.audit_entries(ADMIN, "c").items[0]
    assert (entry.actor, entry.action, entry.subject) == ("system", "memory.expire", gone)
    assert entry.details["expired_at"] == "2026-01-01T00:00:10Z"
    assert desk.mos.newest_change() == newest + 1
    assert desk.mos.get_cube(ADMIN, "c").version == before + 1
    assert desk.mos.archive_expired() == 0


def test_a_sweep_takes_no_more_than_it_may_the_oldest_first_and_over_all_cubes(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="d")
    expiring(desk, "late", seconds=20)
    expiring(desk, "a", "b", seconds=10)
    soon = desk.clock.now + timedelta(seconds=5)
    desk.add("first", cube_id="d", expires_at=soon)
    desk.clock.advance(60)
    assert desk.mos.archive_expired(2) == 2
    told = [e.cube_id for e in desk.mos.audit_entries(ADMIN, limit=2).items]
    assert sorted(told) == ["c", "d"]
    assert [desk.mos.archive_expired(2), desk.mos.archive_expired(2)] == [2, 0]


def test_a_restored_memory_does_not_expire_at_once_again(desk: Desk) -> None:
    swept, unswept = expiring(desk, "swept", "unswept")
    desk.clock.advance(60)
    for memory_id in (unswept, swept):
        restored = desk.mos.restore_memory(ADMIN, "c", memory_id)
        assert (restored.state, restored.expires_at) == (MemoryState.ACTIVE, None)
        assert desk.mos.archive_expired() == (1 if memory_id == unswept else 0)
        if memory_id == unswept:
            assert desk.mos.get_memory(ADMIN, "c", unswept).state is MemoryState.ACTIVE
    later = desk.clock.now + timedelta(seconds=5)
    desk.mos.update_memory(ADMIN, "c", swept, MemoryPatch(expires_at=later))
    desk.mos.archive_memory(ADMIN, "c", swept)
    assert desk.mos.restore_memory(ADMIN, "c", swept).expires_at == later


def test_a_sweep_looks_only_at_what_is_due(desk: Desk) -> None:
    plan = desk.sql(
        "EXPLAIN QUERY PLAN SELECT seq FROM memories WHERE state = 'active' AND "
        "expires_at <= '2030-01-01' ORDER BY expires_at, seq LIMIT 1"
    )
    assert "ix_memories_state_expires_at" in str(plan)
