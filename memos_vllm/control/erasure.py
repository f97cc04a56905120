"""Erasing a memory: nothing of its text stays in the catalog."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from memos_vllm.control.access import OpenCube, open_cube, open_memory, visible
from memos_vllm.control.batches import in_parts
from memos_vllm.control.calls import exactly_once
from memos_vllm.control.composition import take_artifacts
from memos_vllm.control.erasing import newest_entry, queue_erasure
from memos_vllm.control.idempotency import forget_replies
from memos_vllm.control.indexing import note_changed
from memos_vllm.control.service import Service, bump, check_version
from memos_vllm.control.tables import (
    CubeRow,
    LineageRow,
    MemoryRow,
    MemoryVersionRow,
)
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.artifact import ErasedMemory
from memos_vllm.domain.erasure import ErasureOrder, Removed
from memos_vllm.domain.ids import CubeId, JobId, MemoryId
from memos_vllm.domain.memory import Relation
from memos_vllm.domain.needles import Needle, needles_of
from memos_vllm.errors import ConfigurationError


class EraseService(Service):
    """The erasure's part of `Mos`."""

    @exactly_once
    def erase_memory(
        self,
        actor: Principal,
        cube_id: str,
        memory_id: str,
        *,
        if_match: int | None = None,
        tombstone_key: bytes,
    ) -> ErasedMemory:
        """Remove a memory without trace: text, every version, edges, and stored replies.

        What lies elsewhere is left to a job (`control/erasing.py`) that is queued with this.
        What was derived from it goes with it, and what was derived from that: it says the same in
        other words. The cube's epoch moves, so all of its artifacts are out of reach; the audit
        log keeps a keyed hash of each version's text. Legal in every state.

        Args:
            tombstone_key: secret key of the hashes.
        Returns:
            The artifacts of the cubes, whose files the caller has to remove, and the job.
        Raises:
            NotFound, StaleVersion.
            ConfigurationError: the key is empty.
        """
        if not tombstone_key:
            raise ConfigurationError("erasing needs a secret key for the tombstone; it is empty")
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.WRITE)
            row = open_memory(session, cube, memory_id)
            check_version(expected=if_match, found=row.version)
            gone = [row, *_derived_from(session, row)]
            shown = _shown(session, cube, gone[1:])
            touched = {
                cube_id: session.get_one(CubeRow, cube_id)
                for cube_id in dict.fromkeys(memory.cube_id for memory in gone)
            }
            artifacts = {}
            scopes = tuple((cube_row.id, cube_row.epoch) for cube_row in touched.values())
            for cube_row in touched.values():
                artifacts[cube_row.id] = take_artifacts(session, cube_row.id)
                cube_row.epoch += 1
                bump(cube_row, at=now, rescope=True)
            texts = {memory.seq: _texts(session, memory) for memory in gone}
            known = [row, *shown]
            replies = forget_replies(session, naming=[memory.id for memory in known])
            hidden = [memory.id for memory in gone if memory not in known]
            forget_replies(session, naming=hidden)
            for memory in gone:
                session.execute(delete(MemoryRow).where(MemoryRow.seq == memory.seq))
                note_changed(session, memory.cube_id, [memory.seq])
            for memory in gone:
                cube_row = touched[memory.cube_id]
                hashes = [
                    _tombstone(tombstone_key, text) for text in dict.fromkeys(texts[memory.seq])
                ]
                self._log(
                    session,
                    actor,
                    "memory.erase",
                    cube_id=cube_row.id,
                    subject=memory.id,
                    details={
                        "text_hmac_sha256": hashes,
                        "versions": len(texts[memory.seq]),
                        "artifacts": [record.id for record in artifacts[cube_row.id]],
                        "version": cube_row.version,
                        "epoch": cube_row.epoch,
                        **({} if memory is row else {"derived_from": row.id}),
                    },
                    at=now,
                )
            order = ErasureOrder(
                memories=tuple((memory.seq, memory.id) for memory in gone),
                scopes=scopes,
                entry=newest_entry(session),
                counts={
                    Removed.TEXT: sum(len(texts[memory.seq]) for memory in known),
                    Removed.REPLIES: replies,
                    Removed.ARTIFACTS: len(artifacts[cube_id]),
                    Removed.POINTS: len(known),
                },
                needles=_needles(texts.values(), key=tombstone_key),
            )
            job = queue_erasure(
                session,
                order,
                job_id=self._new_id("job"),
                cube_id=cube_id,
                actor=actor,
                at=now,
            )
        self._catalog.scrub()
        return ErasedMemory(
            id=MemoryId(row.id),
            cube_id=CubeId(cube.row.id),
            versions=len(texts[row.seq]),
            epoch=cube.row.epoch,
            artifacts=[record for records in artifacts.values() for record in records],
            job=JobId(job.id),
            derived=tuple(MemoryId(memory.id) for memory in shown),
        )


def _needles(texts: Iterable[Sequence[str]], *, key: bytes) -> tuple[Needle, ...]:
    """By what every version of every text is found again in a log."""
    said = dict.fromkeys(text for versions in texts for text in versions)
    return tuple(dict.fromkeys(needle for text in said for needle in needles_of(text, key=key)))


def _derived_from(session: Session, row: MemoryRow) -> list[MemoryRow]:
    """Every memory that was derived from one, over any number of steps and in any cube."""
    found: dict[int, MemoryRow] = {}
    front = [row.seq]
    while front:
        known = {row.seq, *found}
        new = {
            child.seq: child
            for seqs in in_parts(front)
            for child in session.scalars(
                select(MemoryRow)
                .join(LineageRow, LineageRow.memory_seq == MemoryRow.seq)
                .where(
                    LineageRow.relation == Relation.DERIVED_FROM, LineageRow.target_seq.in_(seqs)
                )
                .order_by(MemoryRow.seq)
            )
            if child.seq not in known
        }
        found |= new
        front = list(new)
    return list(found.values())


def _shown(session: Session, cube: OpenCube, rows: Sequence[MemoryRow]) -> list[MemoryRow]:
    """Those of `rows` that the actor may see."""
    seen = {
        seq
        for seqs in in_parts([row.seq for row in rows])
        for seq in session.scalars(
            select(MemoryRow.seq).where(MemoryRow.seq.in_(seqs), visible(cube, by_number=True))
        )
    }
    return [row for row in rows if row.seq in seen]


def _texts(session: Session, row: MemoryRow) -> Sequence[str]:
    """What a memory said, version by version."""
    return session.scalars(
        select(MemoryVersionRow.text)
        .where(MemoryVersionRow.memory_seq == row.seq)
        .order_by(MemoryVersionRow.version)
    ).all()


def _tombstone(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
