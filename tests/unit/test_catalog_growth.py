"""What a call costs does not grow with the catalog, counted in the steps that SQLite takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from catalog_kit import ADMIN, Desk, open_desk
from sqlalchemy import event

from memos_vllm.domain.access import Principal, Role
from memos_vllm.domain.audit import AuditFilter
from memos_vllm.domain.ids import PrincipalId
from memos_vllm.domain.memory import MemoryPatch, MemoryState, NewMemory, Tier

# The same in both catalogs, and asked for.
CUBE = "c000"
FEW, MANY = 10, 100
# Longer numbers and fuller pages take some more steps; ten times the rows take ten times as many.
MOST = 1.3
_STEPS_AT_ONCE = 5
ANN, ZOE, OWEN = (Principal(PrincipalId(name)) for name in ("ann", "zoe", "owen"))
WHO = {
    "administrator": ADMIN,
    "a grant on every cube": ANN,
    "a grant on one cube": ZOE,
    "owner of every cube": OWEN,
}

Call = Callable[[Desk, Principal], object]
CALLS: dict[str, Call] = {
    "list_cubes": lambda desk, who: desk.mos.list_cubes(who, limit=1),
    "get_cube": lambda desk, who: desk.mos.get_cube(who, CUBE),
    "cube_stats": lambda desk, who: desk.mos.cube_stats(who, CUBE),
    "list_memories": lambda desk, who: desk.mos.list_memories(who, CUBE, limit=2),
    "list_memories by tag": lambda desk, who: desk.mos.list_memories(who, CUBE, tag="red"),
    "list_memories by state": lambda desk, who: desk.mos.list_memories(
        who, CUBE, state=MemoryState.ARCHIVED, tier=Tier.PLAINTEXT
    ),
    "snapshots": lambda desk, who: desk.mos.snapshots(who, [CUBE]),
    "changed_snapshots": lambda desk, who: desk.mos.changed_snapshots(who, [CUBE], known={CUBE: 4}),
    "search_scope": lambda desk, who: desk.mos.search_scope(who, [CUBE]),
    "list_jobs": lambda desk, who: desk.mos.list_jobs(who, cube_id=CUBE),
    "get_job": lambda desk, who: desk.mos.get_job(who, job(desk)),
    "list_grants": lambda desk, who: desk.mos.list_grants(who, CUBE),
    "add_memories": lambda desk, who: desk.mos.add_memories(who, CUBE, [NewMemory("new")]),
    "update_memory": lambda desk, who: desk.mos.update_memory(
        who, CUBE, first(desk), MemoryPatch(tags=("blue",))
    ),
    "promote": lambda desk, who: desk.mos.promote(who, CUBE, to=Tier.ACTIVATION),
}
ADMINISTRATORS: dict[str, Callable[[Desk], object]] = {
    "audit_entries": lambda desk: desk.mos.audit_entries(ADMIN, limit=2),
    "audit_entries of a cube": lambda desk: desk.mos.audit_entries(
        ADMIN, CUBE, which=AuditFilter(actor="owen", action="memory.add")
    ),
    "audit_entries of somebody": lambda desk: desk.mos.audit_entries(
        ADMIN, which=AuditFilter(actor="nobody", action="memory.add")
    ),
    "audit_entries of an action": lambda desk: desk.mos.audit_entries(
        ADMIN, which=AuditFilter(action="nothing.done")
    ),
    "list_jobs": lambda desk: desk.mos.list_jobs(ADMIN, limit=2),
    "claim_job": lambda desk: desk.mos.claim_job("worker", lease_seconds=1),
    "archive_expired": lambda desk: desk.mos.archive_expired(10),
    "newest_change": lambda desk: desk.mos.newest_change(),
    "delete_cube": lambda desk: desk.mos.delete_cube(ADMIN, CUBE),
}


def first(desk: Desk) -> str:
    return desk.mos.list_memories(ADMIN, CUBE, limit=1).items[0].id


def job(desk: Desk) -> str:
    return desk.mos.list_jobs(ADMIN, cube_id=CUBE).items[0].id


def fill(desk: Desk, cubes: int) -> None:
    for number in range(cubes):
        cube = f"c{number:03}"
        desk.mos.create_cube(OWEN, cube_id=cube)
        desk.mos.add_memories(OWEN, cube, [NewMemory(text, tags=("red",)) for text in "ab"])
        desk.mos.add_memories(OWEN, cube, [NewMemory("hidden", labels=("secret",))])
        desk.mos.promote(OWEN, cube, to=Tier.ACTIVATION)
        desk.mos.put_grant(OWEN, cube, "ann", role=Role.EDITOR)
    desk.mos.put_grant(OWEN, CUBE, "zoe", role=Role.EDITOR)
    assert desk.mos.get_cube(ADMIN, CUBE).version == 4


@pytest.fixture(scope="module")
def desks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Desk, Desk]]:
    """The same with few cubes and with many."""
    with (
        open_desk(tmp_path_factory.mktemp("few"), cube=False) as few,
        open_desk(tmp_path_factory.mktemp("many"), cube=False) as many,
    ):
        fill(few, FEW)
        fill(many, MANY)
        yield few, many


@contextmanager
def counted(desk: Desk) -> Iterator[list[None]]:
    """One entry for every so many steps of SQLite's within the block."""
    steps: list[None] = []

    def count(connection: Any, *_: Any) -> None:
        connection.connection.driver_connection.set_progress_handler(
            lambda: steps.append(None), _STEPS_AT_ONCE
        )

    engine = desk.mos._catalog.engine
    event.listen(engine, "before_cursor_execute", count)
    try:
        yield steps
    finally:
        event.remove(engine, "before_cursor_execute", count)


def assert_the_same_work(desks: tuple[Desk, Desk], call: Callable[[Desk], object]) -> None:
    taken = []
    for desk in desks:
        with counted(desk) as steps:
            call(desk)
        taken.append(len(steps))
    few, many = taken
    assert few
    assert many <= MOST * few + 10, f"{few} and {many} times {_STEPS_AT_ONCE} steps"


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("name", CALLS)
def test_no_call_takes_longer_among_many_cubes(
    desks: tuple[Desk, Desk], name: str, who: str
) -> None:
    assert_the_same_work(desks, lambda desk: CALLS[name](desk, WHO[who]))


@pytest.mark.parametrize("name", ADMINISTRATORS)
def test_nor_do_calls_of_the_system_and_its_administrators(
    desks: tuple[Desk, Desk], name: str
) -> None:
    assert_the_same_work(desks, ADMINISTRATORS[name])
