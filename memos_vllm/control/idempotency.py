"""Idempotency-Key: the same key and body give the same answer once, for a day."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from memos_vllm.control.service import Service
from memos_vllm.control.tables import IdempotencyRow
from memos_vllm.domain.access import Principal
from memos_vllm.domain.checks import check_line
from memos_vllm.domain.reply import StoredReply
from memos_vllm.errors import Conflict

KEEP = timedelta(hours=24)
MAX_KEY_CHARS = 255
_PARAM = "Idempotency-Key"


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
            return _reply(session, actor, key, fingerprint, now=self._clock())

    def answer_once(
        self, actor: Principal, key: str, fingerprint: str, act: Callable[[], StoredReply]
    ) -> StoredReply:
        """Run `act`, or repeat the answer that it gave to this key before.

        What `act` changes through this `Mos`, in this thread, and its answer are one transaction:
        a crash leaves both or neither. When it raises, nothing was changed, and the key stays
        free.

        Raises:
            InvalidRequest, Conflict: as `idempotent_reply`.
        """
        check_line(key, param=_PARAM, max_chars=MAX_KEY_CHARS)
        with self._catalog.together() as session:
            found = _reply(session, actor, key, fingerprint, now=self._clock())
            if found is not None:
                return found
            reply = act()
            self.store_reply(actor, key, fingerprint, reply.status, reply.body)
        return reply

    def reserve_reply(
        self, actor: Principal, key: str, fingerprint: str, *, hold_seconds: float = 60.0
    ) -> StoredReply | None:
        """As `idempotent_reply`; when it is None, the key is this caller's to answer.

        For work that outlasts a transaction; `answer_once` is for all other.

        Until `store_reply`, `release_reply` or `hold_seconds` have passed, everyone else gets
        Conflict, so that two requests at once cannot both do the work.
        """
        check_line(key, param=_PARAM, max_chars=MAX_KEY_CHARS)
        now = self._clock()
        with self._catalog.write() as session:
            found = _reply(session, actor, key, fingerprint, now=now)
            if found is None:
                _replace(
                    session,
                    IdempotencyRow(
                        principal_id=actor.id,
                        key=key,
                        fingerprint=fingerprint,
                        status=None,
                        body=None,
                        created_at=now,
                        expires_at=now + timedelta(seconds=hold_seconds),
                    ),
                )
            return found

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
            _replace(
                session,
                IdempotencyRow(
                    principal_id=actor.id,
                    key=key,
                    fingerprint=fingerprint,
                    status=status,
                    body=body,
                    created_at=now,
                    expires_at=now + KEEP,
                ),
            )


def forget_replies(session: Session, *, naming: Sequence[str]) -> None:
    """Empty every stored answer that names one of these ids, and the digest of its request.

    The keys stay used: repeating such a request must not bring back what was erased.
    """
    needles = [f'"{name}"'.encode() for name in naming]
    stored = select(IdempotencyRow).where(IdempotencyRow.body.is_not(None))
    for row in session.scalars(stored.execution_options(yield_per=100)):
        if row.body is not None and any(needle in row.body for needle in needles):
            row.body = row.fingerprint = None
    session.flush()


def _reply(
    session: Session, actor: Principal, key: str, fingerprint: str, *, now: datetime
) -> StoredReply | None:
    row = session.get(IdempotencyRow, (actor.id, key))
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


def _replace(session: Session, row: IdempotencyRow) -> None:
    session.merge(row)
