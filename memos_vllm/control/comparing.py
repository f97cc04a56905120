"""How two cubes differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from memos_vllm.control.access import OpenCube, listing_of, open_cube, visible
from memos_vllm.control.batches import in_parts
from memos_vllm.control.paging import check_limit, encode_cursor, number_key, sealed_number
from memos_vllm.control.service import Service
from memos_vllm.control.tables import MemoryRow, MemoryVersionRow
from memos_vllm.control.views import load_memories
from memos_vllm.domain.access import Access, Principal
from memos_vllm.domain.cartridge import Difference, MemoryDifference
from memos_vllm.domain.page import Page
from memos_vllm.errors import InvalidRequest

_LISTING = "diff"
# Memories that are looked at for one page, which may so be shorter than asked for.
_MOST_READ = 2000
_BATCH = 200
_COMPARED: Final = {
    "text": "text",
    "tags": "tags",
    "labels": "labels",
    "attributes": "metadata",
    "source": "source",
    "state": "state",
    "expires_at": "expires_at",
}

Pair = tuple[MemoryRow | None, MemoryRow | None]


class ComparisonService(Service):
    """The part of `Mos` that compares cubes."""

    def diff_cubes(
        self,
        actor: Principal,
        cube_id: str,
        other_id: str,
        *,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page[MemoryDifference]:
        """What the actor sees in one of two cubes and not, or not the same, in the other.

        A memory and its copy in a clone or an import began as the same text at the same time; they
        are changed when anything that a caller can set differs now. Others are the same when their
        texts are. First comes what is here, in the order it was added, then what is only there. A
        page may be shorter than `limit` without being the last.

        Raises:
            NotFound: one of the cubes.
            InvalidRequest: limit, cursor, or twice the same cube.
        """
        check_limit(limit)
        if cube_id == other_id:
            raise InvalidRequest("with names the same cube; give another one", param="with")
        secret = self._catalog.secret
        there, after = _place(cursor, cube_id, other_id, secret=secret)
        with self._catalog.read() as session:
            here_cube = open_cube(session, actor, cube_id, Access.READ)
            there_cube = open_cube(session, actor, other_id, Access.READ)
            found: list[Pair] = []
            read = 0
            while len(found) < limit and read < _MOST_READ:
                one, other = (there_cube, here_cube) if there else (here_cube, there_cube)
                rows = _next(session, one, after)
                if not rows:
                    if there:
                        return Page(_differences(session, here_cube, there_cube, found))
                    there, after = True, 0
                    continue
                read += len(rows)
                for row, counterpart, is_copy in _counterparts(session, rows, other):
                    after = row.seq
                    if counterpart is None:
                        found.append((None, row) if there else (row, None))
                    elif not there and is_copy and _fields(row, counterpart):
                        found.append((row, counterpart))
                    if len(found) == limit:
                        break
            listing = _listing(cube_id, other_id, there=there)
            reached = encode_cursor(listing, sealed_number(listing, after, secret=secret))
            return Page(_differences(session, here_cube, there_cube, found), reached)


def _listing(cube_id: str, other_id: str, *, there: bool) -> str:
    """What one half of the list is called: of the first cube's memories, or of the other's."""
    return f"{listing_of(_LISTING, cube_id)}/{listing_of('to', other_id)}/{int(there)}"


def _place(cursor: str | None, cube_id: str, other_id: str, *, secret: bytes) -> tuple[bool, int]:
    """Which cube is being read, the other one or the first, and the memory reached there."""
    try:
        here = _listing(cube_id, other_id, there=False)
        return False, number_key(here, cursor, secret=secret) or 0
    except InvalidRequest:
        there = _listing(cube_id, other_id, there=True)
        return True, number_key(there, cursor, secret=secret) or 0


def _next(session: Session, cube: OpenCube, after: int) -> Sequence[MemoryRow]:
    query = select(MemoryRow).where(visible(cube), MemoryRow.seq > after)
    return session.scalars(query.order_by(MemoryRow.seq).limit(_BATCH)).all()


def _counterparts(
    session: Session, rows: Sequence[MemoryRow], other: OpenCube
) -> list[tuple[MemoryRow, MemoryRow | None, bool]]:
    """Each memory with its copy in the other cube, or else one that says the same.

    The last value is whether it is a copy.
    """
    seen = select(MemoryRow).where(visible(other))
    times = {row.created_at for row in rows}
    born = session.scalars(seen.where(MemoryRow.created_at.in_(times))).all()
    first = _first_texts(session, [*rows, *born])
    copies = {(row.created_at, first.get(row.seq)): row for row in reversed(born)}
    sizes = {row.text_bytes for row in rows}
    texts = {row.text for row in rows}
    alike = session.scalars(seen.where(MemoryRow.text_bytes.in_(sizes)))
    by_text = {row.text: row for row in alike if row.text in texts}
    found = []
    for row in rows:
        copy = copies.get((row.created_at, first.get(row.seq)))
        found.append((row, copy or by_text.get(row.text), copy is not None))
    return found


def _first_texts(session: Session, rows: Sequence[MemoryRow]) -> dict[int, str]:
    found: dict[int, str] = {}
    for seqs in in_parts([row.seq for row in rows]):
        query = select(MemoryVersionRow.memory_seq, MemoryVersionRow.text)
        mine = query.where(MemoryVersionRow.memory_seq.in_(seqs), MemoryVersionRow.version == 1)
        found |= {seq: text for seq, text in session.execute(mine)}  # noqa: C416
    return found


def _fields(one: MemoryRow, other: MemoryRow) -> tuple[str, ...]:
    return tuple(
        name for column, name in _COMPARED.items() if getattr(one, column) != getattr(other, column)
    )


def _differences(
    session: Session, here_cube: OpenCube, there_cube: OpenCube, found: Sequence[Pair]
) -> list[MemoryDifference]:
    here = [row for row, _ in found if row is not None]
    there = [row for _, row in found if row is not None]
    memories = {
        memory_row.seq: memory
        for cube, rows in ((here_cube, here), (there_cube, there))
        for memory_row, memory in zip(rows, load_memories(session, cube, rows), strict=True)
    }
    differences = []
    for one, other in found:
        if one is not None and other is not None:
            kind, fields = Difference.CHANGED, _fields(one, other)
        else:
            kind = Difference.ONLY_THERE if one is None else Difference.ONLY_HERE
            fields = ()
        differences.append(
            MemoryDifference(
                kind,
                None if one is None else memories[one.seq],
                None if other is None else memories[other.seq],
                fields,
            )
        )
    return differences
