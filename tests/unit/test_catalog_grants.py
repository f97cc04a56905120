"""Grants: who gets them, who gives them, and that one owner always stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from catalog_kit import ADMIN, Desk, open_desk

from memos_vllm.domain.access import Principal, Role
from memos_vllm.domain.ids import PrincipalId
from memos_vllm.domain.memory import NewMemory
from memos_vllm.errors import Conflict, InvalidRequest, NotFound

ANN, BOB, CAT = (Principal(PrincipalId(name)) for name in ("ann", "bob", "cat"))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with open_desk(tmp_path, cube=False) as opened:
        opened.mos.create_cube(ANN, cube_id="c")
        yield opened


def roles(desk: Desk, who: Principal = ADMIN) -> dict[str, str]:
    return {grant.principal: grant.role for grant in desk.mos.list_grants(who, "c").items}


def test_a_grant_counts_from_the_next_call_on_and_so_does_its_end(desk: Desk) -> None:
    with pytest.raises(NotFound):
        desk.mos.snapshots(BOB, ["c"])
    grant = desk.mos.put_grant(ANN, "c", "bob", role=Role.READER, labels=["hr"])
    assert (grant.principal, grant.role, grant.labels) == ("bob", "reader", ("hr",))
    assert (grant.granted_by, grant.granted_at) == ("ann", desk.clock.now)
    desk.mos.snapshots(BOB, ["c"])
    with pytest.raises(NotFound, match="memcube 'c' does not exist"):
        desk.mos.add_memories(BOB, "c", [NewMemory("x")])
    desk.mos.put_grant(ANN, "c", "bob", role=Role.EDITOR)
    desk.mos.add_memories(BOB, "c", [NewMemory("x")])
    desk.mos.delete_grant(ANN, "c", "bob")
    for call in (desk.mos.get_cube, desk.mos.list_memories, desk.mos.list_grants):
        with pytest.raises(NotFound, match="memcube 'c' does not exist"):
            call(BOB, "c")
    with pytest.raises(NotFound):
        desk.mos.snapshots(BOB, ["c"])


def test_only_who_manages_a_cube_grants_and_for_the_rest_it_does_not_exist(desk: Desk) -> None:
    desk.mos.put_grant(ANN, "c", "cat", role=Role.READER)
    for role in (None, Role.READER, Role.EDITOR, Role.AUDITOR):
        if role is not None:
            desk.mos.put_grant(ANN, "c", "bob", role=role)
        for principal in ("bob", "cat", "new"):
            with pytest.raises(NotFound, match="memcube 'c' does not exist"):
                desk.mos.put_grant(BOB, "c", principal, role=Role.OWNER)
            with pytest.raises(NotFound, match="memcube 'c' does not exist"):
                desk.mos.delete_grant(BOB, "c", principal)
    desk.mos.put_grant(ANN, "c", "bob", role=Role.OWNER)
    desk.mos.put_grant(BOB, "c", "new", role=Role.READER)


def test_owners_see_every_grant_and_others_their_own(desk: Desk) -> None:
    for name, role in (("bob", Role.READER), ("cat", Role.OWNER), ("aud", Role.AUDITOR)):
        desk.mos.put_grant(ANN, "c", name, role=role)
    everyone = {"ann": "owner", "aud": "auditor", "bob": "reader", "cat": "owner"}
    for who in (ADMIN, ANN, CAT):
        assert roles(desk, who) == everyone
    assert roles(desk, BOB) == {"bob": "reader"}
    found: list[str] = []
    cursor = None
    while True:
        page = desk.mos.list_grants(ANN, "c", limit=1, cursor=cursor)
        found += [grant.principal for grant in page.items]
        if (cursor := page.next_cursor) is None:
            break
    assert found == list(everyone)


def test_the_last_owner_cannot_be_removed_or_made_less(desk: Desk) -> None:
    desk.mos.put_grant(ANN, "c", "bob", role=Role.EDITOR)
    with pytest.raises(Conflict, match="last owner"):
        desk.mos.delete_grant(ANN, "c", "ann")
    with pytest.raises(Conflict, match="last owner"):
        desk.mos.put_grant(ANN, "c", "ann", role=Role.READER)
    assert desk.mos.put_grant(ANN, "c", "ann", role=Role.OWNER).role is Role.OWNER
    assert roles(desk) == {"ann": "owner", "bob": "editor"}


def test_an_owner_who_leaves_passes_the_cube_to_the_oldest_other_owner(desk: Desk) -> None:
    for name in ("cat", "bob"):
        desk.clock.advance(1)
        desk.mos.put_grant(ANN, "c", name, role=Role.OWNER)
    desk.mos.delete_grant(ANN, "c", "ann")
    assert desk.mos.get_cube(BOB, "c").owner == "cat"
    assert roles(desk) == {"cat": "owner", "bob": "owner"}
    with pytest.raises(NotFound):
        desk.mos.get_cube(ANN, "c")
    desk.mos.put_grant(CAT, "c", "cat", role=Role.READER)
    assert desk.mos.get_cube(CAT, "c").owner == "bob"
    assert roles(desk) == {"bob": "owner", "cat": "reader"}


def test_the_same_grant_again_changes_nothing_and_leaves_no_second_row(desk: Desk) -> None:
    first = desk.mos.put_grant(ANN, "c", "bob", role=Role.READER, labels=["hr"])
    desk.clock.advance(5)
    assert desk.mos.put_grant(ANN, "c", "bob", role=Role.READER, labels=["hr", "hr"]) == first
    actions = [entry.action for entry in desk.mos.audit_entries(ADMIN, "c").items]
    assert actions == ["grant.put", "cube.create"]


def test_giving_and_taking_are_in_the_log_and_move_no_version_or_epoch(desk: Desk) -> None:
    before = desk.shot()
    desk.mos.put_grant(ANN, "c", "bob", role=Role.EDITOR, labels=["hr"])
    desk.mos.delete_grant(ANN, "c", "bob")
    after = desk.shot()
    assert (after.version, after.epoch) == (before.version, before.epoch)
    taken, given, _ = desk.mos.audit_entries(ADMIN, "c").items
    assert (taken.actor, taken.action, taken.subject) == ("ann", "grant.delete", "bob")
    assert (given.actor, given.action, given.subject) == ("ann", "grant.put", "bob")
    assert given.details == {"labels": ["hr"], "owner": "ann", "role": "editor"}


@pytest.mark.parametrize("name", ["", "a b", "-a", "ä", "a/b", "a" * 65, "local", "system"])
def test_what_is_no_name_of_a_principal_gets_no_grant(desk: Desk, name: str) -> None:
    with pytest.raises(InvalidRequest):
        desk.mos.put_grant(ANN, "c", name, role=Role.READER)
    with pytest.raises(NotFound):
        desk.mos.delete_grant(ANN, "c", name)
    assert roles(desk) == {"ann": "owner"}


def test_a_grant_that_is_not_there_cannot_be_taken(desk: Desk) -> None:
    with pytest.raises(NotFound, match="grant 'bob' does not exist"):
        desk.mos.delete_grant(ANN, "c", "bob")


def test_stored_answers_about_a_cube_go_with_the_grant(desk: Desk) -> None:
    desk.mos.create_cube(BOB, cube_id="d")
    desk.mos.put_grant(ANN, "c", "bob", role=Role.EDITOR)
    for cube_id in ("c", "d"):
        desk.mos.store_reply(BOB, f"key-{cube_id}", "f", 201, f'{{"cube_id":"{cube_id}"}}'.encode())
    desk.mos.delete_grant(ANN, "c", "bob")
    assert desk.mos.idempotent_reply(BOB, "key-c", "f") is None
    assert desk.mos.idempotent_reply(BOB, "key-d", "f") is not None
