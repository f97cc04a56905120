"""The audit log: complete, silent about texts, and hard to bend."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from catalog_kit import ADMIN, KEY, Desk, open_desk
from databases import SQLITE, Database

from memos_vllm.cli.audit import verify_file
from memos_vllm.control import log
from memos_vllm.control.mos import CubePatch
from memos_vllm.domain.audit import AuditProblem
from memos_vllm.domain.job import JobState
from memos_vllm.domain.memory import MemoryPatch, Source, Tier
from memos_vllm.errors import MemosError

SECRET = "xyzzy"


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database) as opened:
        yield opened


def unsealed(desk: Desk, *statements: str) -> None:
    """Tamper as someone who can drop triggers."""
    if desk.database is SQLITE:
        found = desk.sql("SELECT name FROM sqlite_master WHERE type='trigger'")
        triggers = [name for (name,) in found]
    else:
        triggers = ["audit_refuses_change ON audit"]
    desk.sql(*[f"DROP TRIGGER {trigger}" for trigger in triggers], *statements)


def do_everything(desk: Desk) -> None:
    one, two = desk.add(f"{SECRET} one", f"{SECRET} two", source=Source(title=SECRET))
    patch = MemoryPatch(text=f"{SECRET} three", tags=(SECRET,), reason=SECRET)
    desk.mos.update_memory(ADMIN, "c", one.id, patch)
    desk.mos.update_cube(ADMIN, "c", CubePatch(name=SECRET, preamble=SECRET))
    desk.promote()
    desk.run_jobs()
    desk.mos.forget_artifacts([record.id for record in desk.mos.list_artifacts()])
    desk.mos.archive_memory(ADMIN, "c", two.id, reason=SECRET)
    desk.mos.restore_memory(ADMIN, "c", two.id)
    job = desk.mos.promote(ADMIN, "c", to=Tier.ACTIVATION)
    desk.mos.cancel_job(ADMIN, job.id)
    desk.mos.demote(ADMIN, "c", from_tier=Tier.ACTIVATION)
    desk.mos.erase_memory(ADMIN, "c", one.id, tombstone_key=KEY)
    desk.mos.delete_cube(ADMIN, "c")


def test_every_change_leaves_one_row_without_any_text(desk: Desk) -> None:
    do_everything(desk)
    page = desk.mos.audit_entries(ADMIN, limit=1000)
    assert [entry.action for entry in reversed(page.items)] == [
        "cube.create",
        "memory.add",
        "memory.update",
        "cube.update",
        "memory.promote",
        "artifact.record",
        "job.finish",
        "artifact.forget",
        "memory.archive",
        "memory.restore",
        "memory.promote",
        "job.cancel",
        "memory.demote",
        "memory.erase",
        "cube.delete",
    ]
    rows = desk.sql("SELECT * FROM audit")
    assert SECRET not in str(rows)
    verdict = desk.mos.verify_audit()
    assert (verdict.ok, verdict.entries) == (True, len(rows))
    assert verdict.head_hash == page.items[0].hash


def test_a_refused_change_leaves_no_row(desk: Desk) -> None:
    with pytest.raises(MemosError):
        desk.add(" ")
    with pytest.raises(MemosError):
        desk.mos.create_cube(ADMIN, cube_id="c")
    with pytest.raises(MemosError):
        desk.promote()
    assert desk.mos.verify_audit().entries == 1


def test_entries_come_newest_first_in_pages_and_by_cube(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="d")
    desk.add("one")
    first = desk.mos.audit_entries(ADMIN, limit=2)
    second = desk.mos.audit_entries(ADMIN, limit=2, cursor=first.next_cursor)
    assert [entry.seq for entry in [*first.items, *second.items]] == [3, 2, 1]
    assert [entry.seq for entry in desk.mos.audit_entries(ADMIN, "c").items] == [3, 1]
    entry = first.items[0]
    assert (entry.actor, entry.cube_id, entry.at) == ("local", "c", desk.clock.now)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET actor = 'someone' WHERE seq = 1",
        "UPDATE audit SET details = '{}'",
        "DELETE FROM audit WHERE seq = 2",
        "DELETE FROM audit",
        {
            "sqlite": "INSERT OR REPLACE INTO audit SELECT 1, at, 'x', action, cube_id, subject, "
            "details, previous_hash, hash FROM audit WHERE seq = 1",
            "postgresql": "INSERT INTO audit SELECT * FROM audit WHERE seq = 1 "
            "ON CONFLICT (seq) DO UPDATE SET actor = 'x'",
        },
        {"sqlite": "DELETE FROM audit WHERE seq > 0", "postgresql": "TRUNCATE audit CASCADE"},
    ],
)
def test_the_database_itself_refuses_to_change_a_row(
    desk: Desk, statement: str | dict[str, str]
) -> None:
    if isinstance(statement, dict):
        statement = statement[desk.database.name]
    desk.add("one")
    before = desk.sql("SELECT * FROM audit")
    with pytest.raises((sqlite3.IntegrityError, psycopg.Error), match="append-only"):
        desk.sql(statement)
    assert desk.sql("SELECT * FROM audit") == before


@pytest.mark.parametrize(
    "column", ["at", "actor", "action", "cube_id", "subject", "details", "previous_hash", "hash"]
)
def test_a_row_that_was_altered_is_named(desk: Desk, column: str) -> None:
    for number in range(4):
        desk.add(f"m{number}")
    unsealed(desk, f"UPDATE audit SET {column} = 'forged' WHERE seq = 3")
    verdict = desk.mos.verify_audit()
    assert (verdict.ok, verdict.bad_seq, verdict.problem) == (False, 3, AuditProblem.ALTERED)
    assert verdict.entries == 2
    assert "row 3 was altered" in verdict.message


@pytest.mark.parametrize("seq", [1, 3, 5])
def test_a_row_that_was_removed_is_named_at_either_end_too(desk: Desk, seq: int) -> None:
    for number in range(4):
        desk.add(f"m{number}")
    unsealed(desk, f"DELETE FROM audit WHERE seq = {seq}")
    verdict = desk.mos.verify_audit()
    assert (verdict.ok, verdict.bad_seq, verdict.problem) == (False, seq, AuditProblem.MISSING)


def test_a_log_that_was_emptied_is_noticed(desk: Desk) -> None:
    unsealed(desk, "DELETE FROM audit")
    verdict = desk.mos.verify_audit()
    assert (verdict.bad_seq, verdict.problem) == (1, AuditProblem.MISSING)


def test_rows_that_changed_places_are_named(desk: Desk) -> None:
    for number in range(4):
        desk.add(f"m{number}")
    unsealed(
        desk,
        "UPDATE audit SET seq = 99 WHERE seq = 2",
        "UPDATE audit SET seq = 2 WHERE seq = 4",
        "UPDATE audit SET seq = 4 WHERE seq = 99",
    )
    verdict = desk.mos.verify_audit()
    assert (verdict.bad_seq, verdict.problem) == (2, AuditProblem.OUT_OF_PLACE)


def test_a_row_removed_with_the_rest_numbered_anew_is_noticed(desk: Desk) -> None:
    for number in range(4):
        desk.add(f"m{number}")
    unsealed(
        desk,
        "DELETE FROM audit WHERE seq = 3",
        "UPDATE audit SET seq = 3 WHERE seq = 4",
        "UPDATE audit SET seq = 4 WHERE seq = 5",
        "UPDATE audit_head SET seq = 4",
    )
    verdict = desk.mos.verify_audit()
    assert (verdict.bad_seq, verdict.problem) == (3, AuditProblem.OUT_OF_PLACE)


def test_a_row_appended_behind_the_back_of_the_log_is_named(desk: Desk) -> None:
    unsealed(desk, f"UPDATE audit_head SET seq = 0, hash = '{'0' * 64}'")
    verdict = desk.mos.verify_audit()
    assert (verdict.bad_seq, verdict.problem) == (1, AuditProblem.OUT_OF_PLACE)


def test_the_end_of_a_job_is_in_the_log_with_its_state(desk: Desk) -> None:
    desk.add("one")
    job = desk.mos.promote(ADMIN, "c", to=Tier.ACTIVATION)
    desk.mos.claim_job("w", lease_seconds=1)
    desk.mos.finish_job(job.id, "w", state=JobState.FAILED, message="m", error=SECRET)
    entry = desk.mos.audit_entries(ADMIN).items[0]
    assert (entry.action, entry.actor, entry.subject) == ("job.finish", "system", job.id)
    assert entry.details == {"attempts": 1, "state": "failed"}


def exported(desk: Desk, tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(desk.mos.export_audit(ADMIN)))
    return path


def test_an_exported_log_is_verified_without_the_catalog(desk: Desk, tmp_path: Path) -> None:
    do_everything(desk)
    path = exported(desk, tmp_path)
    assert verify_file(path) == desk.mos.verify_audit()
    lines = path.read_text().splitlines(keepends=True)
    for kept, bad_seq, problem in (
        ([*lines[:2], *lines[3:]], 3, AuditProblem.MISSING),
        ([*lines[:-2], lines[-1]], len(lines) - 1, AuditProblem.MISSING),
        ([lines[1], lines[0], *lines[2:]], 1, AuditProblem.MISSING),
        ([lines[0].replace("local", "other"), *lines[1:]], 1, AuditProblem.ALTERED),
    ):
        path.write_text("".join(kept))
        verdict = verify_file(path)
        assert (verdict.ok, verdict.bad_seq, verdict.problem) == (False, bad_seq, problem)
    for kept in (lines[:-1], [], [*lines[:3], lines[3][:20]], ["[]\n"], ["{}\n"], ["[" * 99999]):
        path.write_text("".join(kept))
        with pytest.raises(MemosError):
            verify_file(path)


def test_an_export_of_what_was_tampered_with_says_what_is_there(desk: Desk, tmp_path: Path) -> None:
    desk.add("one")
    unsealed(desk, "UPDATE audit SET details = '{\"a\": ' WHERE seq = 2")
    verdict = verify_file(exported(desk, tmp_path))
    assert (verdict.bad_seq, verdict.problem) == (2, AuditProblem.ALTERED)
    assert desk.mos.audit_entries(ADMIN).items[0].details == {"unreadable": '{"a": '}


def test_a_log_longer_than_one_read_is_verified_and_exported_in_parts(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_ROWS_AT_ONCE", 2)
    for number in range(4):
        desk.add(f"m{number}")
    assert desk.mos.verify_audit().entries == 5
    assert len(list(desk.mos.export_audit(ADMIN))) == 4
    assert verify_file(exported(desk, tmp_path)).entries == 5


def test_a_log_is_verified_while_others_write(desk: Desk) -> None:
    desk.add("one")
    with desk.mos._catalog.write():
        assert desk.mos.verify_audit().ok
    parts = desk.mos.export_audit(ADMIN)
    next(parts)
    desk.add("two")
    assert json.loads(list(parts)[-1])["seq"] == 2


def test_a_row_before_the_first_is_named(desk: Desk) -> None:
    unsealed(
        desk,
        "INSERT INTO audit SELECT -5, at, actor, action, cube_id, subject, details, "
        "previous_hash, hash FROM audit",
    )
    verdict = desk.mos.verify_audit()
    assert (verdict.ok, verdict.bad_seq) == (False, -5)
