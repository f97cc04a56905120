"""A catalog of an earlier release goes on as it was."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from alembic import command
from alembic.config import Config
from catalog_kit import ADMIN

import memos_vllm.control.migrations as scripts
from memos_vllm.control.catalog import create_catalog_engine
from memos_vllm.control.mos import Mos
from memos_vllm.domain.turn import NewTurn

_AT = "2026-01-01 00:00:00.000000"
_BEFORE = f"""
INSERT INTO principals VALUES ('local', 'local', 'local', 1, '{_AT}', NULL);
INSERT INTO cubes VALUES ('c', 'c', '', '', '[]', 'local', 2, 1, 1, '{_AT}', '{_AT}');
INSERT INTO memories (seq, id, cube_id, text, text_bytes, tags, labels, metadata, source, state,
    tier, position, version, created_by, created_at, updated_at)
    VALUES (7, 'mem_old', 'c', 'hello', 5, '[]', '[]', '{{}}', '{{"kind": "turn"}}', 'active',
    'plaintext', 0, 1, 'local', '{_AT}', '{_AT}');
INSERT INTO memory_versions (memory_seq, version, text, tags, labels, metadata, source, state,
    change, changed_by, changed_at)
    VALUES (7, 1, 'hello', '[]', '[]', '{{}}', '{{"kind": "turn"}}', 'active', 'added', 'local',
    '{_AT}');
INSERT INTO chat_sessions VALUES ('c', 's', 3, 7);
INSERT INTO jobs (seq, id, cube_id, kind, state, progress, message, payload, created_by,
    created_at, updated_at, attempts)
    VALUES (1, 'job_old', 'c', 'bake', 'queued', 0.0, 'waiting', '{{}}', 'local',
    '{_AT}', '{_AT}', 0);
"""


def test_conversations_and_histories_of_an_earlier_release_go_on(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    url = f"sqlite:///{path}"
    config = Config()
    config.set_main_option("script_location", str(Path(scripts.__file__).parent))
    engine = create_catalog_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
    engine.dispose()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(_BEFORE)
    mos = Mos.open(url)
    (line,) = mos.memory_history(ADMIN, "c", "mem_old")
    assert (line.text, line.lineage.derived_from) == ("hello", ())
    (turn,) = mos.add_turns(ADMIN, "c", [NewTurn("user", "again")], session_id="s")
    assert turn.source.locator == "turn 4"
    assert [edge.target for edge in mos.get_memory(ADMIN, "c", "mem_old").edges] == [turn.id]
    # A job that was queued before jobs had proofs is still to be done.
    job = mos.claim_job("worker", lease_seconds=30)
    assert job is not None
    assert (job.id, job.proofs) == ("job_old", ())
    page = mos.list_memories(ADMIN, "c", limit=1)
    rest = mos.list_memories(ADMIN, "c", cursor=page.next_cursor)
    assert [one.id for one in rest.items] == [turn.id]
    mos.close()
