"""Memories: add, list, read, change, archive, restore, erase, and their history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from memos_vllm.control.access import OpenCube, listing_of, open_cube, open_memory, visible
from memos_vllm.control.calls import exactly_once
from memos_vllm.control.composition import in_state, mark_stale
from memos_vllm.control.document_rows import withhold_headings
from memos_vllm.control.memory_writes import (
    apply_patch,
    insert_memories,
    record_versions,
    relabel,
    replace_edges,
    replace_words,
)
from memos_vllm.control.paging import check_limit, cut, number_key, sealed_number
from memos_vllm.control.service import Service, bump, check_version
from memos_vllm.control.tables import (
    LineageRow,
    MemoryRow,
    MemoryTagRow,
    MemoryVersionRow,
)
from memos_vllm.control.views import load_history, load_memories
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.checks import JsonObject, check_line
from memos_vllm.domain.lifecycle import Verb, has_expired, move, state_at
from memos_vllm.domain.memory import (
    Memory,
    MemoryChange,
    MemoryPatch,
    MemoryState,
    MemoryVersion,
    NewMemory,
    Relation,
    Tier,
    checked_batch,
    checked_patch,
    validate_reason,
)
from memos_vllm.domain.page import Page
from memos_vllm.domain.patch import UNSET

MAX_QUERY_CHARS = 1000
_LISTING = "memories"


class MemoryService(Service):
    """The memories' part of `Mos`."""

    @exactly_once
    def add_memories(
        self,
        actor: Principal,
        cube_id: str,
        memories: Sequence[NewMemory],
        *,
        reason: str | None = None,
    ) -> list[Memory]:
        """Add memories to the plaintext tier, all or none, in one transaction.

        Args:
            memories: 1 to 1,000.
            reason: why, for the history; it is erased with the memory.
        Raises:
            NotFound: the cube, or the target of an edge.
            InvalidRequest, TooLarge: the message names the memory and the field.
        """
        batch = checked_batch(memories)
        validate_reason(reason)
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.WRITE)
            rows = insert_memories(
                session,
                cube,
                batch,
                ids=[self._new_id("mem") for _ in batch],
                actor=actor,
                reason=reason,
                at=now,
            )
            bump(cube.row, at=now)
            self._log(
                session,
                actor,
                "memory.add",
                cube_id=cube.row.id,
                subject=rows[0].id if len(rows) == 1 else None,
                details={"memories": [row.id for row in rows], "version": cube.row.version},
                at=now,
            )
            return [_as_of(memory, now) for memory in load_memories(session, cube, rows)]

    def list_memories(
        self,
        actor: Principal,
        cube_id: str,
        *,
        state: MemoryState | None = None,
        tier: Tier | None = None,
        tag: str | None = None,
        query: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page[Memory]:
        """Memories in the order they were added.

        Args:
            query: part of the text, upper or lower case.
        Raises:
            NotFound, InvalidRequest.
        """
        check_limit(limit)
        listing, secret = listing_of(_LISTING, cube_id), self._catalog.secret
        after = number_key(listing, cursor, secret=secret)
        now = self._clock()
        wanted = select(MemoryRow).order_by(MemoryRow.seq).limit(limit + 1)
        if state is not None:
            wanted = wanted.where(in_state(state, now))
        if tier is not None:
            wanted = wanted.where(MemoryRow.tier == tier)
        if query is not None:
            check_line(query, param="q", max_chars=MAX_QUERY_CHARS, blank=True)
            wanted = wanted.where(MemoryRow.text.icontains(query, autoescape=True))
        if after is not None:
            wanted = wanted.where(MemoryRow.seq > after)
        with self._catalog.read() as session:
            cube = open_cube(session, actor, cube_id, Access.READ)
            if tag is not None:
                check_line(tag, param="tag", max_chars=MAX_QUERY_CHARS, blank=True)
                tagged = select(MemoryTagRow.memory_seq).where(
                    MemoryTagRow.cube_id == cube.row.id, MemoryTagRow.tag == tag
                )
                wanted = wanted.where(MemoryRow.seq.in_(tagged))
            rows, next_cursor = cut(
                session.scalars(wanted.where(visible(cube))).all(),
                limit=limit,
                listing=listing,
                key=lambda row: sealed_number(listing, row.seq, secret=secret),
            )
            found = [_as_of(memory, now) for memory in load_memories(session, cube, rows)]
        self._note_read(actor.id, cube_id, found)
        return Page(found, next_cursor)

    def get_memory(self, actor: Principal, cube_id: str, memory_id: str) -> Memory:
        """The memory; raises NotFound."""
        with self._catalog.read() as session:
            cube = open_cube(session, actor, cube_id, Access.READ)
            found = _load(session, cube, open_memory(session, cube, memory_id))
        self._note_read(actor.id, cube_id, [found])
        return _as_of(found, self._clock())

    def memory_history(self, actor: Principal, cube_id: str, memory_id: str) -> list[MemoryVersion]:
        """Every version that the actor may see, oldest first; raises NotFound."""
        with self._catalog.read() as session:
            cube = open_cube(session, actor, cube_id, Access.READ)
            row = open_memory(session, cube, memory_id)
            versions = session.scalars(
                select(MemoryVersionRow)
                .where(MemoryVersionRow.memory_seq == row.seq)
                .order_by(MemoryVersionRow.version)
            )
            found = load_history(session, cube, row.id, versions.all())
        self._note_read(actor.id, cube_id, found)
        return found

    @exactly_once
    def update_memory(
        self,
        actor: Principal,
        cube_id: str,
        memory_id: str,
        patch: MemoryPatch,
        *,
        if_match: int | None = None,
    ) -> Memory:
        """Make a new version; artifacts that name the memory become stale.

        A patch that changes nothing moves nothing. New labels move the cube's epoch; a memory
        that gets its first label leaves the activation tier.

        Raises:
            NotFound: the cube, the memory, or the target of an edge.
            Conflict: the memory is archived or merged.
            StaleVersion, InvalidRequest, TooLarge.
        """
        checked = checked_patch(patch)
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.WRITE)
            row = open_memory(session, cube, memory_id)
            check_version(expected=if_match, found=row.version)
            move(
                row.state,
                Verb.EDIT,
                memory_id=row.id,
                expires_at=row.expires_at,
                now=self._clock(),
            )
            before = _load(session, cube, row)
            changed = apply_patch(row, checked, edges=before.edges)
            if not changed:
                self._log_read(session, actor.id, cube.cube_id, [before])
                return before
            if checked.edges is not UNSET and "edges" in changed:
                replace_edges(session, cube, row, checked.edges)
            if "tags" in changed or "labels" in changed:
                replace_words(session, [row])
            relabelled = "labels" in changed
            if relabelled:
                relabel(session, cube, [row])
            self._keep_version(
                session,
                actor,
                cube,
                row,
                MemoryChange.EDITED,
                reason=checked.reason,
                details={"fields": changed},
                rescope=relabelled,
            )
            if relabelled:
                document = withhold_headings(session, cube, row)
                if document is not None:
                    self._keep_version(
                        session,
                        actor,
                        cube,
                        document,
                        MemoryChange.EDITED,
                        reason=None,
                        details={"fields": ["text"]},
                        rescope=False,
                    )
            return _load(session, cube, row)

    @exactly_once
    def archive_memory(
        self,
        actor: Principal,
        cube_id: str,
        memory_id: str,
        *,
        if_match: int | None = None,
        reason: str | None = None,
    ) -> Memory:
        """Put a memory out of use; it keeps its tier and its place for a restore.

        Raises:
            NotFound, StaleVersion.
            Conflict: it is archived already.
        """
        return self._move(actor, cube_id, memory_id, Verb.ARCHIVE, if_match=if_match, reason=reason)

    @exactly_once
    def restore_memory(
        self,
        actor: Principal,
        cube_id: str,
        memory_id: str,
        *,
        if_match: int | None = None,
        reason: str | None = None,
    ) -> Memory:
        """Make an archived or merged memory active again, in the tier that it had.

        One that has expired does not expire any more.

        Raises:
            NotFound, StaleVersion.
            Conflict: it is active already.
        """
        return self._move(actor, cube_id, memory_id, Verb.RESTORE, if_match=if_match, reason=reason)

    def _move(
        self,
        actor: Principal,
        cube_id: str,
        memory_id: str,
        verb: Verb,
        *,
        if_match: int | None,
        reason: str | None,
    ) -> Memory:
        validate_reason(reason)
        now = self._clock()
        with self._catalog.write() as session:
            cube = open_cube(session, actor, cube_id, Access.WRITE)
            row = open_memory(session, cube, memory_id)
            check_version(expected=if_match, found=row.version)
            if row.state is MemoryState.MERGED and verb is Verb.RESTORE:
                session.execute(
                    delete(LineageRow).where(
                        LineageRow.memory_seq == row.seq,
                        LineageRow.relation == Relation.MERGED_INTO,
                    )
                )
            row.state = move(row.state, verb, memory_id=row.id, expires_at=row.expires_at, now=now)
            if verb is Verb.RESTORE and has_expired(row.expires_at, now=now):
                row.expires_at = None
            self._keep_version(
                session,
                actor,
                cube,
                row,
                _CHANGES[verb],
                reason=reason,
                details={},
                rescope=False,
            )
            return _load(session, cube, row)

    def _keep_version(
        self,
        session: Session,
        actor: Principal,
        cube: OpenCube,
        row: MemoryRow,
        change: MemoryChange,
        *,
        reason: str | None,
        details: JsonObject,
        rescope: bool,
    ) -> None:
        """What every change of a memory ends with: version, cube, artifacts, audit."""
        now = self._clock()
        record_versions(session, cube, [row], change, actor=actor, reason=reason, at=now)
        bump(cube.row, at=now, rescope=rescope)
        mark_stale(session, cube.row.id, memory_seqs=[row.seq])
        self._log(
            session,
            actor,
            _ACTIONS[change],
            cube_id=cube.row.id,
            subject=row.id,
            details={**details, "memory_version": row.version, "version": cube.row.version},
            at=now,
        )
        session.flush()


_CHANGES = {Verb.ARCHIVE: MemoryChange.ARCHIVED, Verb.RESTORE: MemoryChange.RESTORED}
_ACTIONS = {
    MemoryChange.EDITED: "memory.update",
    MemoryChange.ARCHIVED: "memory.archive",
    MemoryChange.RESTORED: "memory.restore",
}


def _as_of(memory: Memory, now: datetime) -> Memory:
    """The memory in the state that it is in now, whatever is written down yet."""
    state = state_at(memory.state, memory.expires_at, now=now)
    return memory if state is memory.state else replace(memory, state=state)


def _load(session: Session, cube: OpenCube, row: MemoryRow) -> Memory:
    return load_memories(session, cube, [row])[0]
