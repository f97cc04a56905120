"""Cubes that come in as a whole: from an archive, or as a copy of another one."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from memos_vllm.cartridge.layout import CubeFacts, Part
from memos_vllm.cartridge.records import MemoryRecord, Record, checked_facts, decode
from memos_vllm.control.access import OpenCube, open_cube
from memos_vllm.control.calls import exactly_once, repeatable
from memos_vllm.control.composition import in_prefix
from memos_vllm.control.cube_loading import CubeLoader
from memos_vllm.control.cubes import RemovedCube, insert_cube, remove_cube
from memos_vllm.control.exporting import facts_of, records_of
from memos_vllm.control.jobs import add_job
from memos_vllm.control.memory_writes import insert_rows
from memos_vllm.control.service import Service
from memos_vllm.control.tables import CubeRow, GrantRow, ImportChunkRow, MemoryRow
from memos_vllm.control.views import load_cubes
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.cartridge import MAX_NAMED_IDS, LoadedCube
from memos_vllm.domain.checks import JsonObject
from memos_vllm.domain.ids import JobId
from memos_vllm.domain.job import JobKind, JobState
from memos_vllm.errors import InvalidRequest, NotFound, Unavailable

MAX_STAGED_BYTES = 1 << 20
# Longer than any import takes between two chunks, or between the last one and its commit.
KEEP_STAGED = timedelta(minutes=10)

Records = Iterable[tuple[Part, Sequence[Record]]]


class ImportService(Service):
    """The part of `Mos` that takes in whole cubes."""

    @repeatable
    def stage_import(self, import_id: str, seq: int, part: Part, lines: bytes) -> None:
        """Keep some lines of an archive until `import_cube`; the same call again changes nothing.

        The first lines sweep what imports that died have left behind.

        Args:
            seq: the place of these lines, from 0 without a gap; parts in the archive's order.
            lines: whole ones, of about `MAX_STAGED_BYTES`.
        """
        with self._catalog.write() as session:
            if seq == 0:
                _sweep(session, before=self._clock() - KEEP_STAGED)
            session.merge(
                ImportChunkRow(
                    import_id=import_id,
                    seq=seq,
                    part=part.value,
                    lines=lines,
                    staged_at=self._clock(),
                )
            )

    @repeatable
    def discard_import(self, import_id: str) -> None:
        """Drop what was staged; harmless when nothing was."""
        with self._catalog.write() as session:
            session.execute(delete(ImportChunkRow).where(ImportChunkRow.import_id == import_id))

    @repeatable
    def sweep_imports(self) -> int:
        """Drop the lines of imports that nobody is at any more; how many chunks these were."""
        with self._catalog.write() as session:
            return _sweep(session, before=self._clock() - KEEP_STAGED)

    @exactly_once
    def import_cube(
        self,
        actor: Principal,
        import_id: str,
        facts: CubeFacts,
        *,
        chunks: int,
        archive_digest: str,
        cube_id: str | None = None,
        replace: bool = False,
        trusted: bool = True,
        hold_seconds: float = 0.0,
    ) -> LoadedCube:
        """Make a cube of what was staged; all of it or nothing. It belongs to the actor.

        Memories keep their ids, unless the cube gets another one or an id is in use: then each
        gets a new one, and so does whatever names it.

        Args:
            chunks: how many were staged.
            archive_digest: goes into the audit log.
            cube_id: in place of the one it had.
            replace: remove the cube that has the id, if there is one; its owner and its grants
                stay as they are. Nobody ever sees neither of the two.
            trusted: take vectors as they are; otherwise texts are embedded anew.
            hold_seconds: how long the rebuild of its activation memory waits for artifacts.
        Raises:
            Conflict: the id is taken, by a cube that is not to be replaced or not by the actor.
            InvalidRequest, TooLarge: something that HTTP would not have taken either.
            Unavailable: what was staged is not all there any more.
        """
        checked = checked_facts(facts, cube_id=cube_id, name=None)
        now = self._clock()
        with self._catalog.write() as session:
            staged = _Staged(session, import_id)
            staged.check(chunks)
            replaced = _make_room(session, actor, checked.id) if replace else None
            renamed = checked.id != facts.id or _any_taken(session, staged)
            loaded = self._load(
                session,
                actor,
                checked,
                staged,
                origin=facts.id,
                mapped=renamed,
                trusted=trusted,
                hold_seconds=hold_seconds,
                replaced=replaced,
                action="cube.import",
                details={"archive_blake3": archive_digest},
                at=now,
            )
            session.execute(delete(ImportChunkRow).where(ImportChunkRow.import_id == import_id))
        if replaced is not None:
            self._catalog.scrub()
        return loaded

    @exactly_once
    def clone_cube(
        self,
        actor: Principal,
        cube_id: str,
        new_id: str,
        *,
        name: str | None = None,
        hold_seconds: float = 0.0,
    ) -> LoadedCube:
        """A copy of what the actor may see of a cube, history included; it belongs to the actor.

        Args:
            name: that of the original when None.
            hold_seconds: as of `import_cube`.
        Raises:
            NotFound: the cube.
            Conflict: the new id is taken.
            InvalidRequest: the new id or name.
        """
        now = self._clock()
        with self._catalog.write() as session:
            source = open_cube(session, actor, cube_id, Access.READ)
            return self._load(
                session,
                actor,
                checked_facts(facts_of(source), cube_id=new_id, name=name),
                records_of(session, source),
                origin=source.row.id,
                mapped=True,
                trusted=True,
                hold_seconds=hold_seconds,
                replaced=None,
                action="cube.clone",
                details={},
                at=now,
            )

    def _load(
        self,
        session: Session,
        actor: Principal,
        facts: CubeFacts,
        records: Records,
        *,
        origin: str,
        mapped: bool,
        trusted: bool,
        hold_seconds: float,
        replaced: _Replaced | None,
        action: str,
        details: JsonObject,
        at: datetime,
    ) -> LoadedCube:
        cube = insert_cube(
            session,
            actor,
            cube_id=facts.id,
            name=facts.name,
            description=facts.description,
            preamble=facts.preamble,
            labels=facts.labels,
            created_at=facts.created_at,
            at=at,
        )
        if replaced is not None:
            replaced.hand_over(session, cube.row)
        new_id = _mapping(self._new_id("mem")) if mapped else _kept
        loader = CubeLoader(session, cube, new_id=new_id, with_vectors=trusted)
        named: list[tuple[str, str]] = []
        try:
            for part, some in records:
                loader.load(part, some)
                if mapped and part is Part.MEMORIES and len(named) < MAX_NAMED_IDS:
                    former = [it.id for it in some if isinstance(it, MemoryRecord)]
                    named += [(one, new_id(one)) for one in former[: MAX_NAMED_IDS - len(named)]]
            loader.finish()
        except IntegrityError as error:
            raise InvalidRequest("the archive says the same thing twice") from error
        job_id = self._hold_rebuild(session, actor, cube, hold_seconds=hold_seconds, at=at)
        self._log(
            session,
            actor,
            action,
            cube_id=cube.row.id,
            details={
                "from": origin,
                "memories": loader.memories,
                "ids": "new" if mapped else "kept",
                **({} if replaced is None else {"replaced": replaced.removed.details()}),
                **details,
            },
            at=at,
        )
        session.flush()
        return LoadedCube(
            cube=load_cubes(session, [cube], now=at)[0],
            origin=origin,
            memories=loader.memories,
            mapped=loader.memories if mapped else 0,
            memory_ids=tuple(named),
            job_id=job_id,
            replaced=() if replaced is None else tuple(replaced.removed.artifacts),
        )

    def _hold_rebuild(
        self,
        session: Session,
        actor: Principal,
        cube: OpenCube,
        *,
        hold_seconds: float,
        at: datetime,
    ) -> JobId | None:
        """Queue the rebuild of the cube's prefix, if it has one, under a lease of whoever is about
        to bring artifacts: if that never happens, the lease runs out and the prefix is computed."""
        member = select(MemoryRow.seq).where(MemoryRow.cube_id == cube.row.id, in_prefix(at))
        if session.scalar(member.limit(1)) is None:
            return None
        job = add_job(
            session,
            job_id=self._new_id("job"),
            cube_id=cube.row.id,
            kind=JobKind.REBUILD,
            state=JobState.QUEUED,
            message="waiting for a worker",
            payload={},
            actor=actor,
            at=at,
        )
        if hold_seconds > 0:
            job.state = JobState.RUNNING
            job.message = "waiting for the archive's artifacts"
            job.lease_owner = job.id
            job.lease_until = at + timedelta(seconds=hold_seconds)
        return JobId(job.id)


@dataclass(frozen=True, slots=True)
class _Replaced:
    """What stays of a cube when another takes its place."""

    owner: str
    grants: list[dict[str, Any]]
    removed: RemovedCube

    def hand_over(self, session: Session, row: CubeRow) -> None:
        row.owner = self.owner
        insert_rows(session, GrantRow, self.grants)


def _make_room(session: Session, actor: Principal, cube_id: str) -> _Replaced | None:
    """Remove the cube that has an id; None when there is none that the actor may remove."""
    try:
        row = open_cube(session, actor, cube_id, Access.MANAGE).row
    except NotFound:
        return None
    grants = session.execute(select(GrantRow.__table__).where(GrantRow.cube_id == row.id))
    return _Replaced(
        row.owner, [dict(found) for found in grants.mappings()], remove_cube(session, row)
    )


class _Staged:
    """The records that were staged, read a chunk at a time, as often as asked."""

    def __init__(self, session: Session, import_id: str) -> None:
        self._session = session
        self._import_id = import_id

    def check(self, chunks: int) -> None:
        """Raises Unavailable unless there are so many chunks, without a gap."""
        mine = ImportChunkRow.import_id == self._import_id
        number, last = self._session.execute(
            select(func.count(), func.max(ImportChunkRow.seq)).where(mine)
        ).one()
        if (number, -1 if last is None else last) != (chunks, chunks - 1):
            raise Unavailable("the import stood still for too long and was swept; send it again")

    def __iter__(self) -> Iterator[tuple[Part, Sequence[Record]]]:
        for part, lines in self._chunks():
            yield part, [decode(part, line) for line in lines.rstrip(b"\n").split(b"\n")]

    def of(self, wanted: Part) -> Iterator[Sequence[Record]]:
        """Those of one part, in lists."""
        for part, lines in self._chunks():
            if part is wanted:
                yield [decode(part, line) for line in lines.rstrip(b"\n").split(b"\n")]

    def _chunks(self) -> Iterator[tuple[Part, bytes]]:
        seq = 0
        query = select(ImportChunkRow.part, ImportChunkRow.lines)
        while True:
            mine = (ImportChunkRow.import_id == self._import_id, ImportChunkRow.seq == seq)
            found = self._session.execute(query.where(*mine)).one_or_none()
            if found is None:
                return
            yield Part(found[0]), found[1]
            seq += 1


def _sweep(session: Session, *, before: datetime) -> int:
    """Drop imports of which nothing came since then; how many chunks these were."""
    alive = (
        select(ImportChunkRow.import_id)
        .group_by(ImportChunkRow.import_id)
        .having(func.max(ImportChunkRow.staged_at) > before)
    )
    gone = delete(ImportChunkRow).where(ImportChunkRow.import_id.not_in(alive))
    return len(session.scalars(gone.returning(ImportChunkRow.seq)).all())


def _any_taken(session: Session, staged: _Staged) -> bool:
    """Whether a memory of the archive has the id of one that is here."""
    for records in staged.of(Part.MEMORIES):
        ids = [record.id for record in records if isinstance(record, MemoryRecord)]
        if session.scalar(select(MemoryRow.id).where(MemoryRow.id.in_(ids)).limit(1)) is not None:
            return True
    return False


def _kept(former: str) -> str:
    return former


def _mapping(drawn: str) -> Callable[[str], str]:
    """New ids for old ones, without a table of them.

    Args:
        drawn: a new id, in which 80 bits are random; so nobody can tell beforehand which ids
            an archive's memories get.
    """
    # Kind and time; the random half is replaced by one for each memory.
    opening = drawn[:-16]

    def new_id(former: str) -> str:
        digest = hashlib.blake2b(former.encode(), key=drawn.encode(), digest_size=10).digest()
        return opening + base64.b32hexencode(digest).decode().lower()

    return new_id
