"""Idempotency keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from catalog_kit import ADMIN, Desk, open_desk
from databases import Database

from memos_vllm.control.mos import StoredReply
from memos_vllm.domain.access import Principal
from memos_vllm.domain.ids import PrincipalId
from memos_vllm.errors import Conflict, InvalidRequest

ANN = Principal(PrincipalId("ann"))


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database) as opened:
        yield opened


def test_the_same_key_and_request_give_the_first_answer_again(desk: Desk) -> None:
    assert desk.mos.idempotent_reply(ADMIN, "k", "f") is None
    desk.mos.store_reply(ADMIN, "k", "f", 201, b"\x00first")
    desk.mos.store_reply(ADMIN, "k", "f", 500, b"second")
    desk.reopen()
    assert desk.mos.idempotent_reply(ADMIN, "k", "f") == StoredReply(201, b"\x00first")


def test_the_same_key_for_another_request_is_a_conflict(desk: Desk) -> None:
    desk.mos.store_reply(ADMIN, "k", "f", 201, b"x")
    for call in (desk.mos.idempotent_reply, desk.mos.reserve_reply):
        with pytest.raises(Conflict, match="another request"):
            call(ADMIN, "k", "other")
    with pytest.raises(Conflict):
        desk.mos.store_reply(ADMIN, "k", "other", 201, b"y")


def test_principals_do_not_meet_in_a_key(desk: Desk) -> None:
    desk.mos.store_reply(ADMIN, "k", "f", 201, b"x")
    assert desk.mos.idempotent_reply(ANN, "k", "other") is None


def test_a_key_is_free_again_after_a_day(desk: Desk) -> None:
    desk.mos.store_reply(ADMIN, "k", "f", 201, b"x")
    desk.clock.advance(24 * 3600)
    assert desk.mos.idempotent_reply(ADMIN, "k", "other") is None
    desk.mos.store_reply(ADMIN, "k", "other", 201, b"y")
    assert desk.mos.idempotent_reply(ADMIN, "k", "other") == StoredReply(201, b"y")


def test_a_reserved_key_is_held_until_answered_released_or_forgotten(desk: Desk) -> None:
    assert desk.mos.reserve_reply(ADMIN, "k", "f", hold_seconds=60) is None
    for call in (desk.mos.idempotent_reply, desk.mos.reserve_reply):
        with pytest.raises(Conflict, match="still running"):
            call(ADMIN, "k", "f")
    desk.mos.release_reply(ADMIN, "k")
    assert desk.mos.reserve_reply(ADMIN, "k", "f", hold_seconds=60) is None
    desk.clock.advance(60)
    assert desk.mos.reserve_reply(ADMIN, "k", "f", hold_seconds=60) is None
    desk.mos.store_reply(ADMIN, "k", "f", 201, b"x")
    desk.mos.release_reply(ADMIN, "k")
    assert desk.mos.reserve_reply(ADMIN, "k", "f") == StoredReply(201, b"x")


@pytest.mark.parametrize("key", ["", " ", "a\nb", "x" * 256, "\ud800"])
def test_an_unusable_key_is_refused(desk: Desk, key: str) -> None:
    with pytest.raises(InvalidRequest, match="Idempotency-Key"):
        desk.mos.idempotent_reply(ADMIN, key, "f")
