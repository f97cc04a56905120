"""Idempotency-Key: the same key and body give the same answer once, for a day."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, LargeBinary, delete, false, func, literal, or_, select
from sqlalchemy.orm import Session

from memos_vllm.control.calls import (
    Call,
    CallKey,
    Outcome,
    decode_result,
    encode_result,
    exactly_once,
    repeatable,
)
from memos_vllm.control.service import Service
from memos_vllm.control.tables import IdempotencyRow
from memos_vllm.domain.access import Principal
from memos_vllm.domain.checks import check_line
from memos_vllm.domain.reply import StoredReply
from memos_vllm.errors import Conflict

KEEP = timedelta(hours=24)
MAX_KEY_CHARS = 255
_PARAM = "Idempotency-Key"
# Of a change that was made; its body is what the method returned.
_DONE = 0
# Beyond, it is quicker to read each answer once than to have it searched for each name.
_FEW_NAMES = 8
_QUOTED = re.compile(rb'"([A-Za-z0-9._-]{1,128})"')


class IdempotencyService(Service):
    """The idempotency keys' part of `Mos`.

    Keys of one principal do not meet those of another. `fingerprint` is the caller's digest of
    method, path and body.
    """

    def idempotent_reply(self, actor: Principal, key: str, fingerprint: str) -> StoredReply | None:
        """The answer given to this key before, or None.

        Raises:
            InvalidRequest: the key is blank, too long or no line.
            Conflict: the key was used for another request, is in use by a request that is still
                running, or its answer was erased together with a memory.
        """
        check_line(key, param=_PARAM, max_chars=MAX_KEY_CHARS)
        with self._catalog.read() as session:
            return _reply(session, actor.id, key, fingerprint, now=self._clock())

    def run_once(self, call: Call) -> Outcome:
        """Run a method of this `Mos`, or give the result again that it had under the call's key.

        What it changes and its result are one transaction: a crash leaves both or neither. When
        it raises, nothing was changed, and the key stays free.

        Raises:
            InvalidRequest, Conflict: as `idempotent_reply`; and whatever the method raises.
        """
        key = call.key
        assert key is not None
        method = getattr(self, call.method)
        check_line(key.key, param=_PARAM, max_chars=MAX_KEY_CHARS)
        now = self._clock()
        with self._catalog.together() as session:
            found = _reply(session, key.principal_id, key.key, key.fingerprint, now=now)
            if found is not None:
                return Outcome(decode_result(method, found.body), repeated=True)
            value = method(*call.args, **call.kwargs)
            session.execute(delete(IdempotencyRow).where(IdempotencyRow.expires_at <= now))
            _put(session, key, _DONE, encode_result(method, value), now=now)
        return Outcome(value)

    @exactly_once
    def reserve_reply(
        self, actor: Principal, key: str, fingerprint: str, *, hold_seconds: float = 60.0
    ) -> StoredReply | None:
        """As `idempotent_reply`; when it is None, the key is this caller's to answer.

        For work that outlasts a transaction; `run_once` is for all other.

        Until `store_reply`, `release_reply` or `hold_seconds` have passed, everyone else gets
        Conflict, so that two requests at once cannot both do the work.
        """
        check_line(key, param=_PARAM, max_chars=MAX_KEY_CHARS)
        now = self._clock()
        with self._catalog.write() as session:
            found = _reply(session, actor.id, key, fingerprint, now=now)
            if found is None:
                _put(session, CallKey(actor.id, key, fingerprint, hold_seconds), now=now)
            return found

    @repeatable
    def release_reply(self, actor: Principal, key: str) -> None:
        """Give a reserved key back after the request failed; an answer stays."""
        with self._catalog.write() as session:
            session.execute(
                delete(IdempotencyRow).where(
                    IdempotencyRow.principal_id == actor.id,
                    IdempotencyRow.key == key,
                    IdempotencyRow.status.is_(None),
                )
            )

    @repeatable
    def store_reply(
        self, actor: Principal, key: str, fingerprint: str, status: int, body: bytes
    ) -> None:
        """Keep the answer for a day; the first one stored for a key stays.

        Raises:
            InvalidRequest: the key is blank, too long or no line.
            Conflict: the key was used for another request.
        """
        check_line(key, param=_PARAM, max_chars=MAX_KEY_CHARS)
        now = self._clock()
        with self._catalog.write() as session:
            session.execute(delete(IdempotencyRow).where(IdempotencyRow.expires_at <= now))
            row = session.get(IdempotencyRow, (actor.id, key))
            if row is not None and row.fingerprint != fingerprint:
                raise _used_otherwise(row)
            if row is not None and row.status is not None:
                return
            kept = CallKey(actor.id, key, fingerprint, KEEP.total_seconds())
            _put(session, kept, status, body, now=now)


def forget_replies(session: Session, *, naming: Sequence[str]) -> int:
    """Empty every stored answer that names one of these ids, and the digest of its request.

    The keys stay used: repeating such a request must not bring back what was erased.

    Returns:
        How many answers there were.
    """
    rows = replies_naming(session, naming)
    for row in rows:
        row.body = row.fingerprint = None
    session.flush()
    return len(rows)


def replies_naming(
    session: Session, names: Sequence[str], *, given_to: str | None = None
) -> list[IdempotencyRow]:
    """Stored answers that name one of these ids, all of them or one principal's.

    Every answer is looked into: 100,000 of a kilobyte take 0.15 s for one name, as the database
    does it, and 1 s for any number of names.
    """
    stored = select(IdempotencyRow).where(IdempotencyRow.body.is_not(None))
    if given_to is not None:
        stored = stored.where(IdempotencyRow.principal_id == given_to)
    if len(names) <= _FEW_NAMES:
        holding = or_(false(), *(_holds(session, f'"{name}"'.encode()) for name in names))
        return list(session.scalars(stored.where(holding)))
    wanted = {name.encode() for name in names}
    return [
        row
        for row in session.scalars(stored.execution_options(yield_per=100))
        if row.body is not None and not wanted.isdisjoint(_QUOTED.findall(row.body))
    ]


def _holds(session: Session, needle: bytes) -> ColumnElement[bool]:
    """Condition on `IdempotencyRow`: the body holds these bytes."""
    value = literal(needle, LargeBinary)
    if session.get_bind().dialect.name == "sqlite":
        return func.instr(IdempotencyRow.body, value) > 0
    return func.position(value.op("IN")(IdempotencyRow.body)) > 0


def drop_replies(session: Session, *, given_to: str, naming: str) -> None:
    """Forget the answers that somebody got about a cube or memory that they no longer may read.

    Repeating such a request is answered by what they may do now.
    """
    for row in replies_naming(session, [naming], given_to=given_to):
        session.delete(row)
    session.flush()


def _reply(
    session: Session, principal_id: str, key: str, fingerprint: str, *, now: datetime
) -> StoredReply | None:
    row = session.get(IdempotencyRow, (principal_id, key))
    if row is None or row.expires_at <= now:
        return None
    if row.fingerprint != fingerprint:
        raise _used_otherwise(row)
    if row.status is None or row.body is None:
        raise Conflict("a request with this Idempotency-Key is still running; wait for its answer")
    return StoredReply(row.status, row.body)


def _used_otherwise(row: IdempotencyRow) -> Conflict:
    if row.fingerprint is None:
        return Conflict(
            "the answer to this Idempotency-Key was erased with a memory that it named; "
            "use another key"
        )
    return Conflict(
        "this Idempotency-Key was used for another request; use another key, or repeat that "
        "request unchanged"
    )


def _put(
    session: Session,
    key: CallKey,
    status: int | None = None,
    body: bytes | None = None,
    *,
    now: datetime,
) -> None:
    """Keep an answer under its key, or without one reserve the key."""
    session.merge(
        IdempotencyRow(
            principal_id=key.principal_id,
            key=key.key,
            fingerprint=key.fingerprint,
            status=status,
            body=body,
            created_at=now,
            expires_at=now + timedelta(seconds=key.keep_seconds),
        )
    )
