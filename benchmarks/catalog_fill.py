"""A catalog of many cubes, made of a few that the service itself has written.

`write_cubes` has `Mos` and the indexer write them: memories with tags, labels and edges, some of
them promoted, an artifact, a job, grants, the audit log, vectors and mentions. `repeat` copies the
rows of all that as often as is asked, with other ids, in SQL; the log's hash chain goes on over the
copies, and the copies' points go into the index. The service would take an hour for what takes
minutes here, and leave the same rows.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import Table

from benchmarks.search import Speech
from memos_vllm.control.mos import Mos
from memos_vllm.control.tables import Base
from memos_vllm.domain.access import LOCAL_ADMIN, Role
from memos_vllm.domain.artifact import ActivationState, ArtifactRecord
from memos_vllm.domain.audit import seal
from memos_vllm.domain.ids import ArtifactId, CubeId
from memos_vllm.domain.indexing import MemoryToIndex
from memos_vllm.domain.job import JobState
from memos_vllm.domain.memory import Edge, NewMemory, Source, Tier
from memos_vllm.domain.scope import FilterFields
from memos_vllm.plaintext import packing
from memos_vllm.plaintext.document import indexed_text
from memos_vllm.plaintext.index.base import IndexPoint, VectorIndex
from memos_vllm.plaintext.terms import document_terms

ORIGINALS = 10
MEMORIES_A_CUBE = 100
PROMOTED = 10
# Who has a grant on every cube.
EVERYWHERE = "ann"
_POINTS_AT_ONCE = 512
# What a cube leaves in the catalog, but for the log.
_COPIED = (
    "cubes", "grants", "memories", "memory_versions", "memory_tags", "memory_labels", "edges",
    "memory_vectors", "memory_entities", "artifacts", "artifact_memories", "jobs",
)  # fmt: skip
_MEMORY_ID = re.compile(r"\bmem_")


def cube_id(number: int) -> str:
    """The id of a cube: originals come first."""
    return f"cube-{number:06}"


def write_cubes(mos: Mos) -> None:
    """Have the service write the originals."""
    for number in range(ORIGINALS):
        cube, speech = cube_id(number), Speech(number)
        mos.create_cube(LOCAL_ADMIN, cube_id=cube, name=f"cube {number}", labels=["support"])
        first = mos.add_memories(LOCAL_ADMIN, cube, [_memory(speech, 0)])
        mos.add_memories(
            LOCAL_ADMIN,
            cube,
            [
                _memory(speech, place, (Edge("about", first[0].id),) if place % 5 == 0 else ())
                for place in range(1, MEMORIES_A_CUBE)
            ],
        )
        some = mos.list_memories(LOCAL_ADMIN, cube, limit=PROMOTED)
        promoted = [one.id for one in some.items]
        mos.promote(LOCAL_ADMIN, cube, to=Tier.ACTIVATION, memory_ids=promoted)
        _bake(mos)
        mos.put_grant(LOCAL_ADMIN, cube, EVERYWHERE, role=Role.READER)


def _memory(speech: Speech, place: int, edges: tuple[Edge, ...] = ()) -> NewMemory:
    return NewMemory(
        text=speech.sentence(15),
        tags=(f"tag-{place % 10}",),
        labels=("private",) if place >= MEMORIES_A_CUBE - 2 else (),
        source=Source(kind="note", author=speech.sentence(4).split()[3]),
        edges=edges,
    )


def _bake(mos: Mos) -> None:
    """Do what the engine's worker does, without an engine."""
    while job := mos.claim_job("bench", lease_seconds=60):
        (shot,) = mos.snapshots(LOCAL_ADMIN, [job.cube_id])
        mos.record_artifact(
            ArtifactRecord(
                id=ArtifactId(f"artifact-{job.cube_id}"),
                cube_id=shot.id,
                kind="kv-prefix",
                head_key="head",
                scope="scope",
                tokens=400,
                bytes=9_000_000,
                memory_versions=tuple((one.id, one.version) for one in shot.memories),
                state=ActivationState.READY,
                created_at=job.created_at,
                cube_version=shot.version,
            )
        )
        mos.finish_job(job.id, "bench", state=JobState.SUCCEEDED, message="baked")


def repeat(path: Path, times: int) -> None:
    """Make every cube of an SQLite catalog, which nobody has open, exist so many times."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous=OFF")
        database.execute("PRAGMA cache_size=-262144")
        serials = {
            name: database.execute(f"SELECT coalesce(max(seq), 0) FROM {name}").fetchone()[0]
            for name in ("memories", "jobs")
        }
        copies = [
            _copy(Base.metadata.tables[name], memories=serials["memories"], jobs=serials["jobs"])
            for name in _COPIED
        ]
        log = database.execute("SELECT * FROM audit ORDER BY seq").fetchall()
        for copy in range(1, times):
            database.execute("BEGIN")
            for statement in copies:
                database.execute(statement, {"copy": copy})
            _continue_log(database, log, copy)
            database.execute("COMMIT")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _copy(table: Table, *, memories: int, jobs: int) -> str:
    """The statement that copies the originals' rows of a table; `:copy` is a number from 1 on.

    Args:
        memories, jobs: how many numbers the originals have taken.
    """
    values = []
    for column in table.columns:
        name = f'"{column.name}"'
        target = next((one.column for one in column.foreign_keys), column)
        place = f"{target.table.name}.{target.name}"
        if place == "memories.seq":
            values.append(f"{name} + :copy * {memories}")
        elif place == "jobs.seq":
            values.append(f"{name} + :copy * {jobs}")
        elif place == "cubes.id" or column.name == "cube_id":
            values.append(_renamed_cube(name))
        elif place in {"memories.id", "jobs.id", "artifacts.id"}:
            values.append(_renamed(name))
        else:
            values.append(name)
    columns = ", ".join(f'"{column.name}"' for column in table.columns)
    originals = _originals(table, memories=memories, jobs=jobs)
    return (
        f"INSERT INTO {table.name} ({columns}) "
        f"SELECT {', '.join(values)} FROM {table.name} WHERE {originals}"
    )


def _originals(table: Table, *, memories: int, jobs: int) -> str:
    """Condition: the row is an original's and no copy's."""
    if table.name in {"memories", "jobs"}:
        return f"seq <= {memories if table.name == 'memories' else jobs}"
    if "memory_seq" in table.columns:
        return f"memory_seq <= {memories}"
    return f"{'id' if table.name == 'cubes' else 'cube_id'} < '{cube_id(ORIGINALS)}'"


def _renamed_cube(name: str) -> str:
    return f"printf('cube-%06d', cast(substr({name}, 6) AS INTEGER) + :copy * {ORIGINALS})"


def _renamed(name: str) -> str:
    """As `mem_01k9…` and `mem_000123…`: of one length for all, and in the order of the copies."""
    return (
        f"substr({name}, 1, instr(replace({name}, '-', '_'), '_')) || printf('%06d', :copy) || "
        f"substr({name}, instr(replace({name}, '-', '_'), '_') + 1)"
    )


def _continue_log(database: sqlite3.Connection, log: list[tuple[Any, ...]], copy: int) -> None:
    """Append what the log says of the originals, said of their copies."""
    ((number, previous),) = database.execute("SELECT seq, hash FROM audit_head")
    rows = []
    for _, at, actor, action, cube, subject, details, _, _ in log:
        if cube is None:
            continue
        new = {
            "at": at,
            "actor": actor,
            "action": action,
            "cube_id": cube_id(int(cube[5:]) + copy * ORIGINALS),
            "subject": subject and _MEMORY_ID.sub(f"mem_{copy:06}", subject),
            "details": _MEMORY_ID.sub(f"mem_{copy:06}", details),
            "previous_hash": previous,
        }
        number, previous = number + 1, seal(**new)
        rows.append((number, *new.values(), previous))
    database.executemany("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    database.execute("UPDATE audit_head SET seq = ?, hash = ?", (number, previous))


def original_points(mos: Mos, *, embedder: str) -> list[IndexPoint]:
    """The originals' points, as the indexer makes them."""
    seqs = range(1, ORIGINALS * MEMORIES_A_CUBE + 1)
    return [_point(item) for item in mos.memories_to_index(seqs, embedder=embedder)]


def _point(item: MemoryToIndex) -> IndexPoint:
    assert item.vector is not None
    memory = item.memory
    return IndexPoint(
        seq=item.seq,
        version=memory.version,
        cube_id=CubeId(memory.cube_id),
        dense=packing.unpacked(item.vector),
        sparse=document_terms(indexed_text(memory).sparse),
        fields=FilterFields.of(memory),
    )


def repeat_points(index: VectorIndex, originals: list[IndexPoint], times: int) -> None:
    """Put the copies' points into the index."""
    waiting: list[IndexPoint] = []
    for number, point in enumerate(_copies(originals, times)):
        waiting.append(point)
        if len(waiting) == _POINTS_AT_ONCE:
            index.upsert(waiting)
            waiting = []
            if number % (64 * _POINTS_AT_ONCE) == 0:
                index.flush()
    if waiting:
        index.upsert(waiting)
    index.flush()


def _copies(originals: list[IndexPoint], times: int) -> Iterator[IndexPoint]:
    step = len(originals)
    for copy in range(1, times):
        for point in originals:
            number = int(point.cube_id[5:]) + copy * ORIGINALS
            yield IndexPoint(
                seq=point.seq + copy * step,
                version=point.version,
                cube_id=CubeId(cube_id(number)),
                dense=point.dense,
                sparse=point.sparse,
                fields=point.fields,
            )
