"""A desk for catalog tests: a real catalog, and a clock to turn."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from databases import SQLITE, Database, Rows
from sqlalchemy import make_url

from memos_vllm.control.catalog import Catalog
from memos_vllm.control.mos import Mos
from memos_vllm.control.tables import GrantRow, PrincipalRow
from memos_vllm.domain.access import LOCAL_ADMIN, Principal, PrincipalKind, Role
from memos_vllm.domain.artifact import ActivationState, ArtifactRecord
from memos_vllm.domain.cube import CubeSnapshot
from memos_vllm.domain.ids import ArtifactId, IdSource, PrincipalId
from memos_vllm.domain.memory import Memory, NewMemory, Tier

ADMIN = LOCAL_ADMIN
KEY = b"tombstone key of the tests"
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Clock:
    """Stands still until told otherwise."""

    now: datetime = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@dataclass
class Desk:
    """A Mos, its clock and its database."""

    url: str
    clock: Clock = field(default_factory=Clock)
    database: Database = SQLITE
    mos: Mos = field(init=False)

    def __post_init__(self) -> None:
        self.mos = self._open()

    @property
    def path(self) -> Path:
        """SQLite's file."""
        assert self.database is SQLITE
        return Path(str(make_url(self.url).database))

    def _open(self) -> Mos:
        catalog = Catalog.open(self.url, busy_timeout_seconds=5.0)
        return Mos(catalog, clock=self.clock, new_id=IdSource())

    def reopen(self) -> None:
        self.mos.close()
        self.mos = self._open()

    def add(self, *texts: str, cube_id: str = "c", **fields: object) -> list[Memory]:
        memories = [NewMemory(text=text, **fields) for text in texts]
        return self.mos.add_memories(ADMIN, cube_id, memories)

    def shot(self, cube_id: str = "c") -> CubeSnapshot:
        return self.mos.snapshots(ADMIN, [cube_id])[0]

    def state(self, cube_id: str = "c") -> str:
        return self.mos.get_cube(ADMIN, cube_id).activation.state.value

    def promote(self, *memory_ids: str, cube_id: str = "c") -> None:
        self.mos.promote(ADMIN, cube_id, to=Tier.ACTIVATION, memory_ids=list(memory_ids) or None)

    def artifact(self, shot: CubeSnapshot | None = None, *, name: str = "art") -> ArtifactRecord:
        """What the engine would record after baking `shot`."""
        shot = shot or self.shot()
        return ArtifactRecord(
            id=ArtifactId(f"{name}-{shot.id}-{shot.version}"),
            cube_id=shot.id,
            kind="kv-prefix",
            head_key="head",
            scope="scope",
            tokens=100,
            bytes=4096,
            memory_versions=tuple((memory.id, memory.version) for memory in shot.memories),
            state=ActivationState.READY,
            created_at=self.clock.now,
            cube_version=shot.version,
        )

    def run_jobs(self, cube_id: str = "c") -> None:
        """Do what the engine's worker does: claim, bake, record, finish."""
        from memos_vllm.domain.job import JobState

        while job := self.mos.claim_job("worker", lease_seconds=30):
            self.mos.record_artifact(self.artifact(self.shot(job.cube_id)))
            self.mos.finish_job(job.id, "worker", state=JobState.SUCCEEDED, message="baked")

    def grant(
        self, name: str, role: Role, *, cube_id: str = "c", labels: Sequence[str] = ()
    ) -> Principal:
        """A principal that is no administrator and has this grant."""
        with self.mos._catalog.write() as session:
            session.add(PrincipalRow(id=name, kind=PrincipalKind.USER, name=name, created_at=START))
            session.flush()
            session.add(
                GrantRow(
                    cube_id=cube_id,
                    principal_id=name,
                    role=role,
                    labels=list(labels),
                    granted_by="local",
                    granted_at=START,
                )
            )
        return Principal(PrincipalId(name))

    def sql(self, *statements: str) -> Rows:
        """Run SQL behind the catalog's back; the rows of the last statement."""
        return self.database.sql(self.url, *statements)

    def stored_bytes(self) -> bytes:
        """All that the catalog stores."""
        return self.database.contents(self.url)


@contextmanager
def open_desk(folder: Path, database: Database = SQLITE, *, cube: bool = True) -> Iterator[Desk]:
    """A desk over the catalog of `folder`, with an empty cube `c`."""
    desk = Desk(database.create(folder), database=database)
    if cube:
        desk.mos.create_cube(ADMIN, cube_id="c")
    try:
        yield desk
    finally:
        desk.mos.close()
        database.remove(desk.url)


def start_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process that runs `code`; its standard output comes line by line."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    )


def add_at_once(desk: Desk, *, threads: int, each: int) -> list[BaseException]:
    """Add memories from several threads; what failed."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(each):
                desk.add("text")
        except BaseException as error:  # noqa: BLE001  (handed to the caller)
            failures.append(error)

    working = [threading.Thread(target=work) for _ in range(threads)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    return failures
