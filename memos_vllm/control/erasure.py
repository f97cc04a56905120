"""Erasing a memory: nothing of its text stays in the catalog."""

from __future__ import annotations

import hashlib
import hmac

from sqlalchemy import delete, select

from memos_vllm.control.access import open_cube, open_memory
from memos_vllm.control.composition import take_artifacts
from memos_vllm.control.idempotency import forget_replies
from memos_vllm.control.indexing import note_changed
from memos_vllm.control.service import Service, bump, check_version
from memos_vllm.control.tables import MemoryRow, MemoryVersionRow
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.artifact import ErasedMemory
from memos_vllm.domain.ids import CubeId, MemoryId
from memos_vllm.errors import ConfigurationError


class EraseService(Service):
    """The erasure's part of `Mos`."""

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

        The cube's epoch moves, so all of its artifacts are out of reach; the audit log keeps a
        keyed hash of each version's text. Legal in every state.

        Args:
            tombstone_key: secret key of the hashes.
        Returns:
            The artifacts of the cube, whose files the caller has to remove.
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
            texts = session.scalars(
                select(MemoryVersionRow.text)
                .where(MemoryVersionRow.memory_seq == row.seq)
                .order_by(MemoryVersionRow.version)
            ).all()
            hashes = [_tombstone(tombstone_key, text) for text in dict.fromkeys(texts)]
            artifacts = take_artifacts(session, cube.row.id)
            forget_replies(session, naming=row.id)
            session.execute(delete(MemoryRow).where(MemoryRow.seq == row.seq))
            note_changed(session, cube.row.id, [row.seq])
            cube.row.epoch += 1
            bump(cube.row, at=now, rescope=True)
            self._log(
                session,
                actor,
                "memory.erase",
                cube_id=cube.row.id,
                subject=row.id,
                details={
                    "text_hmac_sha256": hashes,
                    "versions": len(texts),
                    "artifacts": [record.id for record in artifacts],
                    "version": cube.row.version,
                    "epoch": cube.row.epoch,
                },
                at=now,
            )
        return ErasedMemory(
            id=MemoryId(row.id),
            cube_id=CubeId(cube.row.id),
            versions=len(texts),
            epoch=cube.row.epoch,
            artifacts=artifacts,
            log_truncated=self._catalog.scrub(),
        )


def _tombstone(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
