"""The file underneath: durable, migrated, private, and clear when it cannot be used."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path

import pytest
from catalog_kit import ADMIN, Desk, add_at_once, open_desk, start_python
from databases import Database

from memos_vllm.control.catalog import Catalog, create_catalog_engine
from memos_vllm.control.migrate import HEAD
from memos_vllm.control.mos import Mos
from memos_vllm.control.tables import Base, MemoryRow
from memos_vllm.errors import ConfigurationError, Unavailable

WRITER = """
import sys
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.domain.memory import NewMemory
mos = Mos.open(sys.argv[1])
while True:
    batch = mos.add_memories(LOCAL_ADMIN, "c", [NewMemory(f"text {n}") for n in range(3)])
    print(*(memory.id for memory in batch), flush=True)
"""
STARTER = """
import sys
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN
sys.stdin.readline()
Mos.open(sys.argv[1]).create_cube(LOCAL_ADMIN, cube_id=sys.argv[2])
"""


@pytest.mark.parametrize("acknowledged", [1, 7, 20])
def test_nothing_acknowledged_is_lost_or_halved_when_the_writer_is_killed(
    tmp_path: Path, database: Database, acknowledged: int
) -> None:
    with open_desk(tmp_path, database) as desk:
        with start_python(WRITER, desk.url) as writer:
            assert writer.stdout is not None
            kept = [memory for _ in range(acknowledged) for memory in next(writer.stdout).split()]
            writer.kill()
            kept += [memory for line in writer.stdout for memory in line.split()]
        desk.reopen()
        page = desk.mos.list_memories(ADMIN, "c", limit=1000)
        stored = [memory.id for memory in page.items]
        assert stored[: len(kept)] == kept
        # At most the one batch that was under way is there on top, and it is whole.
        assert len(stored) - len(kept) in (0, 3)
        verdict = desk.mos.verify_audit()
        assert (verdict.ok, verdict.entries) == (True, 1 + len(stored) // 3)
        assert desk.mos.get_cube(ADMIN, "c").version == 1 + len(stored) // 3


def test_processes_that_start_at_once_on_nothing_agree_on_one_catalog(
    tmp_path: Path, database: Database
) -> None:
    url = database.new(tmp_path)
    with ExitStack() as stack:
        starters = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", STARTER, url, f"c{number}"], stdin=subprocess.PIPE
                )
            )
            for number in range(3)
        ]
        for starter in starters:
            assert starter.stdin is not None
            starter.stdin.write(b"go\n")
            starter.stdin.flush()
        assert [starter.wait(timeout=60) for starter in starters] == [0, 0, 0]
    mos = Mos.open(url)
    assert [cube.id for cube in mos.list_cubes(ADMIN).items] == ["c0", "c1", "c2"]
    assert mos.verify_audit().entries == 3
    mos.close()


def test_the_migrations_make_exactly_the_tables_of_the_models(
    tmp_path: Path, database: Database
) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    import memos_vllm.control.migrations as scripts

    catalog = Catalog.open(database.new(tmp_path))
    with catalog.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        assert context.get_current_revision() == HEAD
    catalog.close()
    config = Config()
    config.set_main_option("script_location", str(Path(scripts.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_opening_a_catalog_again_changes_nothing(tmp_path: Path) -> None:
    with open_desk(tmp_path) as desk:
        schema = desk.sql("SELECT name, sql FROM sqlite_master ORDER BY name")
        desk.reopen()
        assert desk.sql("SELECT name, sql FROM sqlite_master ORDER BY name") == schema
        assert desk.mos.get_cube(ADMIN, "c").version == 1


def test_a_catalog_of_a_newer_version_is_refused_and_left_alone(
    tmp_path: Path, database: Database
) -> None:
    with open_desk(tmp_path, database) as desk:
        desk.mos.close()
        desk.sql("UPDATE alembic_version SET version_num = '9999'")
        with pytest.raises(ConfigurationError, match="newer version"):
            Mos.open(desk.url)
        assert desk.sql("SELECT version_num FROM alembic_version") == [("9999",)]


def test_every_connection_is_durable_and_overwrites_what_it_deletes(tmp_path: Path) -> None:
    with open_desk(tmp_path) as desk, ExitStack() as stack:
        expected = {
            "journal_mode": "wal",
            "synchronous": 2,
            "foreign_keys": 1,
            "secure_delete": 1,
            "busy_timeout": 5000,
        }
        for _ in range(3):
            connection = stack.enter_context(desk.mos._catalog.engine.connect())
            found = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in expected
            }
            assert found == expected


def test_the_catalog_is_for_its_owners_eyes_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with open_desk(tmp_path) as desk:
            folder = desk.path.parent
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
            assert set(modes.values()) == {0o600}, modes
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "url", ["", "nonsense", "sqlite://", "sqlite:///:memory:", "no-such-database://x/y"]
)
def test_a_url_that_cannot_be_used_is_refused_with_advice(url: str) -> None:
    with pytest.raises(ConfigurationError):
        create_catalog_engine(url)


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        create_catalog_engine(f"sqlite:///{tmp_path / 'file' / 'catalog.sqlite'}")


def test_a_file_that_is_no_database_is_unavailable_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(b"not a database " * 500)
    with pytest.raises((Unavailable, ConfigurationError)):
        Mos.open(f"sqlite:///{path}")
    assert path.read_bytes().startswith(b"not a database")


def test_a_writer_that_waits_too_long_is_told_to_try_again_and_no_text_leaks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import sqlite3

    with open_desk(tmp_path) as desk:
        desk.mos.close()
        desk.mos._catalog = Catalog.open(desk.url, busy_timeout_seconds=0.05)
        blocker = sqlite3.connect(desk.path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with caplog.at_level(logging.DEBUG), pytest.raises(Unavailable) as caught:
            desk.add("xyzzy")
        # Readers are not held up by a writer.
        assert desk.mos.get_cube(ADMIN, "c").memories.active == 0
        blocker.execute("ROLLBACK")
        blocker.close()
        assert "xyzzy" not in caplog.text + str(caught.value) + repr(caught.value.__cause__)
        assert len(desk.add("later")) == 1


@pytest.mark.parametrize("missing", [None, "tier"])
def test_a_broken_constraint_names_no_text(
    tmp_path: Path, database: Database, missing: str | None
) -> None:
    from sqlalchemy.exc import IntegrityError

    with open_desk(tmp_path, database) as desk:
        (memory,) = desk.add("xyzzy")

        def insert_again() -> None:
            with desk.mos._catalog.write() as session:
                row = session.get(MemoryRow, 1)
                assert row is not None
                columns = [one.key for one in MemoryRow.__mapper__.column_attrs]
                columns.remove("seq")
                values = {name: getattr(row, name) for name in columns}
                if missing is not None:
                    values |= {"id": "other", missing: None}
                session.add(MemoryRow(**values))

        with pytest.raises(IntegrityError) as caught:
            insert_again()
        told = "".join(traceback.format_exception(caught.value))
        assert "xyzzy" not in told
        assert memory.id not in told


def test_threads_that_write_at_once_lose_nothing(tmp_path: Path, database: Database) -> None:
    with open_desk(tmp_path, database) as desk:
        assert add_at_once(desk, threads=8, each=10) == []
        assert desk.mos.get_cube(ADMIN, "c").memories.active == 80
        assert desk.mos.verify_audit().entries == 81


def test_a_catalog_in_a_folder_with_odd_characters_opens(tmp_path: Path) -> None:
    desk = Desk(f"sqlite:///{tmp_path / '50% off é' / 'catalog.sqlite'}")
    desk.mos.create_cube(ADMIN, cube_id="c")
    assert desk.path.exists()
    desk.mos.close()


def test_importing_the_control_plane_loads_no_model_code() -> None:
    code = (
        "import sys, memos_vllm.control.mos\n"
        "print([name for name in ('torch', 'vllm', 'ray', 'alembic', 'numpy') "
        "if name in sys.modules])"
    )
    with start_python(code) as process:
        assert process.communicate(timeout=60)[0].strip() == "[]"
