"""Principals that are no administrators: roles and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from catalog_kit import ADMIN, KEY, Desk, open_desk
from databases import Database

from memos_vllm.control.mos import CubePatch, Mos
from memos_vllm.domain.access import Principal, Role
from memos_vllm.domain.ids import PrincipalId
from memos_vllm.domain.memory import Edge, MemoryPatch, NewMemory, Tier
from memos_vllm.errors import Forbidden, NotFound

STRANGER = Principal(PrincipalId("stranger"))
Call = Callable[[Mos, Principal, str], object]
READS: list[Call] = [
    lambda mos, who, memory: mos.list_memories(who, "c"),
    lambda mos, who, memory: mos.get_memory(who, "c", memory),
    lambda mos, who, memory: mos.memory_history(who, "c", memory),
    lambda mos, who, memory: mos.snapshots(who, ["c"]),
    lambda mos, who, memory: mos.list_jobs(who, cube_id="c"),
]
WRITES: list[Call] = [
    lambda mos, who, memory: mos.add_memories(who, "c", [NewMemory("x")]),
    lambda mos, who, memory: mos.update_memory(who, "c", memory, MemoryPatch(text="y")),
    lambda mos, who, memory: mos.promote(who, "c", to=Tier.ACTIVATION, memory_ids=[memory]),
    lambda mos, who, memory: mos.demote(who, "c", from_tier=Tier.ACTIVATION),
    lambda mos, who, memory: mos.archive_memory(who, "c", memory),
    lambda mos, who, memory: mos.restore_memory(who, "c", memory),
    lambda mos, who, memory: mos.erase_memory(who, "c", memory, tombstone_key=KEY),
]
SEES: list[Call] = [
    lambda mos, who, memory: mos.get_cube(who, "c"),
    lambda mos, who, memory: mos.cube_stats(who, "c"),
]
AUDITS: list[Call] = [lambda mos, who, memory: mos.audit_entries(who, "c")]
MANAGES: list[Call] = [
    lambda mos, who, memory: mos.update_cube(who, "c", CubePatch(name="n")),
    lambda mos, who, memory: mos.delete_cube(who, "c"),
]
ALLOWED = {
    Role.READER: SEES + READS,
    Role.EDITOR: SEES + READS + WRITES,
    Role.OWNER: SEES + READS + AUDITS + WRITES + MANAGES,
    Role.AUDITOR: SEES + AUDITS,
}
EVERYTHING = SEES + READS + AUDITS + WRITES + MANAGES


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database) as opened:
        yield opened


@pytest.mark.parametrize("role", list(Role))
def test_a_role_reaches_what_it_allows_and_the_rest_does_not_exist(desk: Desk, role: Role) -> None:
    (memory,) = desk.add("text")
    who = desk.grant("ann", role)
    for call in EVERYTHING:
        if call in ALLOWED[role]:
            call(desk.mos, who, memory.id)
        else:
            with pytest.raises(NotFound, match="memcube 'c' does not exist"):
                call(desk.mos, who, memory.id)


def test_for_a_stranger_the_cube_does_not_exist_in_any_call_or_list(desk: Desk) -> None:
    (memory,) = desk.add("text")
    desk.promote()
    job = desk.mos.list_jobs(ADMIN).items[0]
    for call in EVERYTHING:
        with pytest.raises(NotFound) as hidden:
            call(desk.mos, STRANGER, memory.id)
        assert str(hidden.value) == "memcube 'c' does not exist"
    for read in (desk.mos.get_job, desk.mos.cancel_job):
        with pytest.raises(NotFound):
            read(STRANGER, job.id)
    assert desk.mos.list_cubes(STRANGER).items == []
    assert desk.mos.list_jobs(STRANGER).items == []
    with pytest.raises(NotFound):
        desk.mos.audit_entries(STRANGER)


def test_whoever_creates_a_cube_owns_it(desk: Desk) -> None:
    ann = Principal(PrincipalId("ann"))
    cube = desk.mos.create_cube(ann, cube_id="mine")
    assert cube.owner == "ann"
    assert [one.id for one in desk.mos.list_cubes(ann).items] == ["mine"]
    assert desk.mos.snapshots(ann, ["mine"])[0].id == "mine"
    with pytest.raises(NotFound):
        desk.mos.snapshots(ann, ["mine", "c"])


def test_a_labelled_memory_shows_in_nothing_without_a_grant_for_every_label(desk: Desk) -> None:
    (secret,) = desk.add("secret plan", tags=("t",), labels=("hr", "legal"))
    (public,) = desk.add("public plan", tags=("t",), edges=(Edge("next", secret.id),))
    readers = {
        "none": desk.grant("none", Role.READER),
        "some": desk.grant("some", Role.EDITOR, labels=["hr"]),
        "all": desk.grant("all", Role.READER, labels=["legal", "hr", "other"]),
    }
    for name, who in readers.items():
        sees = name == "all"
        both = [secret.id, public.id] if sees else [public.id]
        listed = desk.mos.list_memories(who, "c", tag="t", query="plan").items
        assert [memory.id for memory in listed] == both, name
        assert listed[-1].edges == (public.edges if sees else ()), name
        assert desk.mos.get_cube(who, "c").memories.active == len(both), name
        assert desk.mos.list_cubes(who).items[0].tiers.plaintext == len(both), name
        stats = desk.mos.cube_stats(who, "c").tiers[Tier.PLAINTEXT]
        assert (stats.memories, stats.text_bytes) == (len(both), 11 * len(both)), name
        for read in (desk.mos.get_memory, desk.mos.memory_history):
            if sees:
                read(who, "c", secret.id)
            else:
                with pytest.raises(NotFound, match=f"memory '{secret.id}' does not exist"):
                    read(who, "c", secret.id)
    with pytest.raises(NotFound):
        desk.mos.add_memories(readers["some"], "c", [NewMemory("x", edges=(Edge("n", secret.id),))])


@pytest.mark.parametrize("cube_id", ["user.ann", "agent.ann"])
def test_nobody_makes_a_cube_that_is_called_after_somebody_else(desk: Desk, cube_id: str) -> None:
    ann, ben = (Principal(PrincipalId(name)) for name in ("ann", "ben"))
    desk.mos.create_cube(ben, cube_id="plain")
    for make in (
        lambda: desk.mos.create_cube(ben, cube_id=cube_id),
        lambda: desk.mos.clone_cube(ben, "plain", cube_id),
    ):
        with pytest.raises(Forbidden):
            make()
    assert desk.mos.create_cube(ann, cube_id=cube_id).owner == "ann"
    # Whether it is there, ben is not told.
    with pytest.raises(Forbidden):
        desk.mos.create_cube(ben, cube_id=cube_id)
    desk.mos.create_cube(ADMIN, cube_id=cube_id.replace("ann", "cid"))
