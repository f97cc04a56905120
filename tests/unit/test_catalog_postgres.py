"""PostgreSQL's own ways of failing, and what its users write."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from catalog_kit import ADMIN, Desk, add_at_once, open_desk
from databases import Postgres

from memos_vllm.control.catalog import Catalog
from memos_vllm.control.mos import Mos
from memos_vllm.errors import ConfigurationError, Unavailable
from memos_vllm.process import free_port

SECRET = "xyzzy"


@pytest.fixture
def desk(tmp_path: Path, postgres: Postgres) -> Iterator[Desk]:
    with open_desk(tmp_path, postgres) as opened:
        yield opened


@pytest.mark.parametrize("crash", [False, True])
def test_a_server_that_went_away_is_unavailable_and_serves_again_once_it_is_back(
    desk: Desk, postgres: Postgres, crash: bool
) -> None:
    kept = [memory.id for memory in desk.add("one", "two")]
    postgres.stop(crash=crash)
    try:
        for _ in range(2):
            with pytest.raises(Unavailable, match="try again"):
                desk.add("three")
            with pytest.raises(Unavailable):
                desk.mos.get_cube(ADMIN, "c")
    finally:
        postgres.start()
    kept += [memory.id for memory in desk.add("four")]
    assert [memory.id for memory in desk.mos.list_memories(ADMIN, "c").items] == kept
    assert desk.mos.verify_audit().ok


def test_a_server_that_goes_away_in_the_middle_of_a_change_leaves_none_of_it(
    desk: Desk, postgres: Postgres
) -> None:
    def change() -> None:
        with desk.mos._catalog.together():
            desk.add("one")
            postgres.stop(crash=True)
            desk.add("two")

    with pytest.raises(Unavailable):
        change()
    postgres.start()
    assert desk.mos.list_memories(ADMIN, "c").items == []
    assert desk.mos.verify_audit().entries == 1


def test_a_writer_that_waits_too_long_is_told_to_try_again_and_no_text_leaks(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.mos._catalog = Catalog.open(desk.url, busy_timeout_seconds=0.05)
    with psycopg.connect(desk.url) as blocker:
        blocker.execute("SELECT * FROM audit_head FOR UPDATE")
        with caplog.at_level(logging.DEBUG), pytest.raises(Unavailable) as caught:
            desk.add(SECRET)
        # Readers are not held up by a writer.
        assert desk.mos.get_cube(ADMIN, "c").memories.active == 0
    assert SECRET not in caplog.text + str(caught.value) + repr(caught.value.__cause__)
    assert len(desk.add("later")) == 1


def test_a_writer_that_was_cut_off_halfway_holds_the_others_up_for_a_moment_only(
    desk: Desk, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine was lost, or it was stopped, and the server hears no more of it."""
    monkeypatch.setattr("memos_vllm.control.catalog._SILENT_WRITER_SECONDS", 0.3)
    stopped = Desk(desk.url, desk.clock, postgres)

    def change() -> None:
        with stopped.mos._catalog.together():
            stopped.add("of the one that was stopped")
            assert len(desk.add("of another")) == 1
            # It wakes up, and cannot finish what it had begun.
            stopped.add("more")

    began = time.monotonic()
    with pytest.raises(Unavailable):
        change()
    assert 0.2 < time.monotonic() - began < 5
    texts = [memory.text for memory in desk.mos.list_memories(ADMIN, "c").items]
    assert texts == ["of another"]
    assert desk.mos.verify_audit().ok
    stopped.mos.close()


def test_a_read_sees_one_state_and_can_change_nothing(desk: Desk) -> None:
    with desk.mos._catalog.read() as session:
        count = "SELECT count(*) FROM memories"
        found = session.connection().exec_driver_sql(count).scalar()
        writer = threading.Thread(target=lambda: desk.add("one"))
        writer.start()
        writer.join()
        assert session.connection().exec_driver_sql(count).scalar() == found == 0
    with pytest.raises(Unavailable), desk.mos._catalog.read() as session:
        session.connection().exec_driver_sql("DELETE FROM memories")
    assert desk.mos.get_cube(ADMIN, "c").memories.active == 1


@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
def test_a_server_with_another_default_isolation_serves_writers_all_the_same(
    tmp_path: Path, postgres: Postgres, level: str
) -> None:
    with open_desk(tmp_path, postgres) as desk:
        name = desk.url.partition("@/")[2].partition("?")[0]
        desk.sql(f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'")
        desk.reopen()
        assert add_at_once(desk, threads=4, each=5) == []
        assert desk.mos.verify_audit().entries == 21


def test_nobody_there_is_unavailable_at_once_and_the_password_is_nowhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    began = time.monotonic()
    with caplog.at_level(logging.DEBUG), pytest.raises(Unavailable) as caught:
        Mos.open(f"postgresql://memos:{SECRET}@127.0.0.1:{free_port()}/memos")
    assert time.monotonic() - began < 5
    assert SECRET not in caplog.text + str(caught.value) + repr(caught.value.__cause__)


@pytest.mark.parametrize("url", ["postgresql://memos:xyzzy@host:nonsense/x", "postgresql+none://x"])
def test_an_address_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Mos.open(url)
    assert SECRET not in str(caught.value)


def test_letters_of_any_script_are_found_in_either_case(desk: Desk) -> None:
    desk.add("ÉCOLE", "straße", "100% _sure_")
    for query, expected in (("école", 1), ("STRASSE", 0), ("STRA", 1), ("0% _S", 1), ("%", 1)):
        found = desk.mos.list_memories(ADMIN, "c", query=query).items
        assert len(found) == expected, query
