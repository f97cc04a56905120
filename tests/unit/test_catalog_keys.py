"""Keys and principals in the catalog: made, found, revoked, and never stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from catalog_kit import ADMIN, Desk, open_desk

from memos_vllm.control.keys import keys_exist
from memos_vllm.domain.access import Principal, PrincipalKind, Role
from memos_vllm.domain.ids import PrincipalId
from memos_vllm.domain.keys import ApiKey, KeyState, digest_of, draw_key, is_token, public_part
from memos_vllm.errors import Conflict, Forbidden, InvalidRequest, NotFound


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with open_desk(tmp_path) as opened:
        yield opened


def make(desk: Desk, name: str, **fields: object) -> tuple[ApiKey, str]:
    drawn = draw_key()
    return desk.mos.create_key(ADMIN, name, drawn.digest, **fields), drawn.token


def who(desk: Desk, token: str) -> Principal | None:
    holder = desk.mos.authenticate(digest_of(token))
    return None if holder is None else holder.principal


def test_a_key_stands_for_its_principal(desk: Desk) -> None:
    make(desk, "ops")
    key, token = make(desk, "bot", kind=PrincipalKind.AGENT)

    assert who(desk, token) == Principal(PrincipalId("bot"), PrincipalKind.AGENT, admin=False)
    assert (key.principal, key.kind, key.admin, key.state) == ("bot", "agent", False, "active")
    assert token.startswith(key.prefix + "_")
    assert who(desk, draw_key().token) is None


def test_a_key_has_256_random_bits_and_only_its_digest_is_on_the_disk(desk: Desk) -> None:
    _, token = make(desk, "ops")
    secret = token.removeprefix(public_part(token) + "_")

    assert is_token(token)
    assert len(secret) == 43
    stored = desk.stored_bytes()
    assert secret.encode() not in stored
    assert digest_of(token) in stored
    assert "token" not in repr(draw_key())


def test_the_first_key_is_an_administrators_and_the_others_are_not(desk: Desk) -> None:
    assert not desk.mos.has_keys()
    with pytest.raises(Conflict, match="the first key must be an administrator's"):
        make(desk, "alice", admin=False)
    assert not desk.mos.has_keys()

    assert make(desk, "ops")[0].admin
    assert not make(desk, "alice")[0].admin
    assert make(desk, "root", admin=True)[0].admin


def test_a_revoked_key_is_worthless_and_stays_listed(desk: Desk) -> None:
    _, admin = make(desk, "ops")
    key, token = make(desk, "alice")

    revoked = desk.mos.revoke_key(ADMIN, key.prefix)
    assert (revoked.state, revoked.revoked_at) == (KeyState.REVOKED, desk.clock.now)
    assert who(desk, token) is None
    assert who(desk, admin) is not None
    # Again is no error, and writes no second row.
    desk.clock.advance(5)
    assert desk.mos.revoke_key(ADMIN, key.id) == revoked
    assert [listed.state for listed in desk.mos.list_keys(ADMIN).items] == ["active", "revoked"]
    assert [entry.action for entry in desk.mos.audit_entries(ADMIN).items].count("key.revoke") == 1


def test_a_key_ends_at_its_time(desk: Desk) -> None:
    make(desk, "ops")
    key, token = make(desk, "alice", expires_at=desk.clock.now + timedelta(days=1))
    desk.clock.advance(24 * 3600 - 1)
    assert who(desk, token) is not None
    desk.clock.advance(1)
    assert who(desk, token) is None
    assert desk.mos.list_keys(ADMIN).items[1] == replace(key, state=KeyState.EXPIRED)
    with pytest.raises(InvalidRequest, match="must lie in the future"):
        make(desk, "late", expires_at=desk.clock.now)


def test_a_catalog_that_had_a_key_never_says_that_it_has_none(desk: Desk) -> None:
    key, _ = make(desk, "ops", expires_at=desk.clock.now + timedelta(seconds=1))
    desk.mos.revoke_key(ADMIN, key.id)
    desk.clock.advance(60)
    assert desk.mos.has_keys()
    assert keys_exist(desk.url)


def test_asking_whether_there_are_keys_makes_no_catalog(tmp_path: Path) -> None:
    assert not keys_exist(f"sqlite:///{tmp_path}/data/catalog.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_only_administrators_manage_keys(desk: Desk) -> None:
    make(desk, "ops")
    _, token = make(desk, "alice")
    alice = who(desk, token)
    assert alice is not None
    for refused in (
        lambda: desk.mos.create_key(alice, "eve", draw_key().digest),
        lambda: desk.mos.list_keys(alice),
        lambda: desk.mos.revoke_key(alice, public_part(token)),
    ):
        with pytest.raises(Forbidden):
            refused()
    assert len(desk.mos.list_keys(ADMIN).items) == 2


def test_a_key_that_is_sent_to_be_made_twice_is_made_once(desk: Desk) -> None:
    drawn = draw_key()
    first = desk.mos.create_key(ADMIN, "ops", drawn.digest)
    assert desk.mos.create_key(ADMIN, "ops", drawn.digest) == first
    assert len(desk.mos.list_keys(ADMIN).items) == 1


def test_what_a_principal_is_changes_only_while_no_key_stands_for_it(desk: Desk) -> None:
    desk.grant("alice", Role.READER)
    make(desk, "ops")
    assert make(desk, "alice", kind=PrincipalKind.SERVICE)[0].kind is PrincipalKind.SERVICE
    with pytest.raises(Conflict, match="'alice' has keys and is no administrator"):
        make(desk, "alice", admin=True)
    with pytest.raises(Conflict, match="'alice' has keys and is a service"):
        make(desk, "alice", kind=PrincipalKind.USER)
    assert make(desk, "alice")[0].kind is PrincipalKind.SERVICE


@pytest.mark.parametrize(
    "name",
    ["local", "system", "", "Alice", "a b", "-a", "a/b", "a\n", "é", "a" * 65, "\x00", "a\ud800"],
)
def test_a_principals_name_is_plain_and_not_one_of_ours(desk: Desk, name: str) -> None:
    with pytest.raises(InvalidRequest):
        make(desk, name)
    assert not desk.mos.has_keys()


@pytest.mark.parametrize("key", ["", "key_", "mos_", "'; --", "\ud800", "\x00", "k" * 10_000])
def test_revoking_what_is_no_key_finds_nothing(desk: Desk, key: str) -> None:
    make(desk, "ops")
    with pytest.raises(NotFound):
        desk.mos.revoke_key(ADMIN, key)


def test_every_key_made_and_revoked_is_in_the_audit_log_without_its_secret(desk: Desk) -> None:
    key, token = make(desk, "ops")
    desk.mos.revoke_key(ADMIN, key.id)
    made, revoked = list(desk.mos.audit_entries(ADMIN).items)[1::-1]
    assert (made.action, made.actor, made.subject) == ("key.create", "local", key.id)
    assert made.details["principal"] == "ops"
    assert (revoked.action, revoked.subject) == ("key.revoke", key.id)
    assert token not in repr((made, revoked))
    assert desk.mos.verify_audit().ok


def test_the_last_use_is_known_to_the_minute(desk: Desk) -> None:
    key, _ = make(desk, "ops")
    used = []
    for _ in range(4):
        desk.mos.note_key_uses([key.id])
        used.append(desk.mos.list_keys(ADMIN).items[0].last_used_at)
        desk.clock.advance(25)
    assert used == [used[0], used[0], used[0], used[0] and used[0] + timedelta(seconds=75)]


def test_keys_are_listed_page_by_page(desk: Desk) -> None:
    made = [make(desk, f"p{number}")[0].id for number in range(5)]
    seen, cursor = [], None
    while True:
        page = desk.mos.list_keys(ADMIN, limit=2, cursor=cursor)
        seen += [key.id for key in page.items]
        if (cursor := page.next_cursor) is None:
            break
    assert seen == made
    with pytest.raises(InvalidRequest):
        desk.mos.list_keys(ADMIN, cursor="nonsense")
