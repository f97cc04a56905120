"""API keys and the principals that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import inspect, or_, select, update
from sqlalchemy.orm import Session

from memos_vllm.control.access import require_admin, require_id
from memos_vllm.control.calls import exactly_once, repeatable
from memos_vllm.control.catalog import Catalog, create_catalog_engine, sqlite_file
from memos_vllm.control.paging import check_limit, cut, text_key
from memos_vllm.control.service import Service
from memos_vllm.control.tables import KeyRow, PrincipalRow
from memos_vllm.domain.access import Principal, PrincipalKind, check_principal_id
from memos_vllm.domain.checks import check_time
from memos_vllm.domain.ids import PrincipalId
from memos_vllm.domain.keys import ApiKey, KeyDigest, KeyHolder, KeyState
from memos_vllm.domain.page import Page
from memos_vllm.errors import Conflict, InvalidRequest, NotFound

LEASE_SECONDS = 1.0
"""How long a process that checks keys takes the catalog's answer for granted. Whoever has revoked a
key, or made the first one, waits that long before saying so."""

# A key's last use is known to the minute; a busy key costs one small write in that time.
USE_PRECISION = timedelta(minutes=1)
_LISTING = "keys"


class KeyService(Service):
    """The keys' part of `Mos`. Only administrators manage keys; authenticating asks for nobody."""

    @exactly_once
    def create_key(
        self,
        actor: Principal,
        principal_id: str,
        digest: KeyDigest,
        *,
        admin: bool | None = None,
        kind: PrincipalKind | None = None,
        expires_at: datetime | None = None,
    ) -> ApiKey:
        """Let a key stand for a principal, who is made if unknown.

        The caller draws the key (`draw_key`) and shows it; nothing here ever sees it. Repeated
        with the same digest this answers the same key.

        Args:
            admin: what the principal is to be; None leaves it as it is. The very first key is an
                administrator's, since nobody else could make a second one.
            kind: what stands behind the principal; None leaves it as it is, a user when new.
        Raises:
            Forbidden: the actor is no administrator.
            InvalidRequest: the principal's id or kind, or `expires_at` is not in the future.
            Conflict: `admin` or `kind` differ from what the principal's other keys stand for, or
                it is the first key and `admin` is False.
        """
        require_admin(actor, "managing keys")
        name = check_principal_id(principal_id)
        if kind is PrincipalKind.LOCAL:
            raise InvalidRequest("kind must be user, agent or service", param="kind")
        now = self._clock()
        expires = check_time(expires_at, param="expires_at")
        if expires is not None and expires <= now:
            raise InvalidRequest("expires_at must lie in the future", param="expires_at")
        with self._catalog.write() as session:
            known = session.scalar(select(KeyRow).where(KeyRow.digest == digest.sha256))
            if known is not None:
                return _to_key(known, session.get_one(PrincipalRow, known.principal_id), now=now)
            if not _any_key(session):
                if admin is False:
                    raise Conflict(
                        "the first key must be an administrator's, or nobody could make another; "
                        "make that one first"
                    )
                admin = True
            holder = _holder(session, name, admin=admin, kind=kind, at=now)
            row = KeyRow(
                id=self._new_id("key"),
                principal_id=name,
                prefix=digest.prefix,
                digest=digest.sha256,
                created_at=now,
                created_by=actor.id,
                expires_at=expires,
            )
            session.add(row)
            self._log(
                session,
                actor,
                "key.create",
                cube_id=None,
                subject=row.id,
                details={
                    "principal": name,
                    "kind": holder.kind.value,
                    "admin": holder.admin,
                    "prefix": row.prefix,
                    "expires_at": None if expires is None else expires.isoformat(),
                },
                at=now,
            )
            return _to_key(row, holder, now=now)

    def list_keys(
        self, actor: Principal, *, limit: int = 50, cursor: str | None = None
    ) -> Page[ApiKey]:
        """Every key that was ever made, in that order.

        Raises:
            Forbidden: the actor is no administrator.
            InvalidRequest: limit or cursor.
        """
        require_admin(actor, "managing keys")
        check_limit(limit)
        after = text_key(_LISTING, cursor)
        query = (
            select(KeyRow, PrincipalRow)
            .join(PrincipalRow, PrincipalRow.id == KeyRow.principal_id)
            .order_by(KeyRow.id)
            .limit(limit + 1)
        )
        if after is not None:
            query = query.where(KeyRow.id > after)
        now = self._clock()
        with self._catalog.read() as session:
            rows, next_cursor = cut(
                session.execute(query).all(),
                limit=limit,
                listing=_LISTING,
                key=lambda row: row[0].id,
            )
        return Page([_to_key(row, holder, now=now) for row, holder in rows], next_cursor)

    @repeatable
    def revoke_key(self, actor: Principal, key: str) -> ApiKey:
        """Make a key worthless for good; doing so twice is no error.

        Args:
            key: its id, or its prefix.
        Raises:
            Forbidden: the actor is no administrator.
            NotFound: no such key.
        """
        require_admin(actor, "managing keys")
        require_id("key", key)
        now = self._clock()
        with self._catalog.write() as session:
            row = session.scalar(select(KeyRow).where(or_(KeyRow.id == key, KeyRow.prefix == key)))
            if row is None:
                raise NotFound("key", key)
            holder = session.get_one(PrincipalRow, row.principal_id)
            if row.revoked_at is None:
                row.revoked_at = now
                self._log(
                    session,
                    actor,
                    "key.revoke",
                    cube_id=None,
                    subject=row.id,
                    details={"principal": holder.id, "prefix": row.prefix},
                    at=now,
                )
            return _to_key(row, holder, now=now)

    def authenticate(self, sha256: bytes) -> KeyHolder | None:
        """Whom the key with this digest stands for; None when it is unknown, revoked or expired."""
        query = (
            select(KeyRow, PrincipalRow)
            .join(PrincipalRow, PrincipalRow.id == KeyRow.principal_id)
            .where(KeyRow.digest == sha256, PrincipalRow.disabled_at.is_(None))
        )
        with self._catalog.read() as session:
            found = session.execute(query).one_or_none()
        if found is None:
            return None
        row, holder = found
        if _state(row, now=self._clock()) is not KeyState.ACTIVE:
            return None
        principal = Principal(PrincipalId(holder.id), holder.kind, admin=holder.admin)
        return KeyHolder(principal, row.id, row.expires_at, row.last_used_at)

    def has_keys(self) -> bool:
        """Whether a key was ever made, be it revoked or expired by now."""
        with self._catalog.read() as session:
            return _any_key(session)

    @repeatable
    def note_key_uses(self, key_ids: Sequence[str]) -> None:
        """Record that these keys were used just now; no more than once a minute each."""
        now = self._clock()
        stale = or_(KeyRow.last_used_at.is_(None), KeyRow.last_used_at <= now - USE_PRECISION)
        with self._catalog.write() as session:
            session.execute(
                update(KeyRow)
                .where(KeyRow.id.in_(list(key_ids)), stale)
                .values(last_used_at=now)
                .execution_options(synchronize_session=False)
            )


def keys_exist(url: str) -> bool:
    """Whether the catalog at this URL has ever had a key; it is neither made nor migrated.

    Raises:
        ConfigurationError: the URL or its driver cannot be used.
        Unavailable: the database does not answer.
    """
    file = sqlite_file(url)
    if file is not None and not file.exists():
        return False
    catalog = Catalog(create_catalog_engine(url))
    try:
        with catalog.read() as session:
            known = inspect(session.connection()).has_table(KeyRow.__tablename__)
            return known and _any_key(session)
    finally:
        catalog.close()


def _any_key(session: Session) -> bool:
    return session.scalar(select(KeyRow.id).limit(1)) is not None


def _holder(
    session: Session,
    name: PrincipalId,
    *,
    admin: bool | None,
    kind: PrincipalKind | None,
    at: datetime,
) -> PrincipalRow:
    """The principal, made or changed only while no key stands for it."""
    holder = session.get(PrincipalRow, name)
    if holder is None:
        holder = PrincipalRow(
            id=name, kind=PrincipalKind.USER, name=name, admin=False, created_at=at
        )
        session.add(holder)
    elif session.scalar(select(KeyRow.id).where(KeyRow.principal_id == name).limit(1)) is not None:
        if admin is not None and admin != holder.admin:
            other = "an administrator" if holder.admin else "no administrator"
            raise Conflict(f"'{name}' has keys and is {other}; choose another name")
        if kind is not None and kind is not holder.kind:
            raise Conflict(f"'{name}' has keys and is a {holder.kind}; choose another name")
    holder.admin = holder.admin if admin is None else admin
    holder.kind = holder.kind if kind is None else kind
    session.flush()
    return holder


def _state(row: KeyRow, *, now: datetime) -> KeyState:
    if row.revoked_at is not None:
        return KeyState.REVOKED
    if row.expires_at is not None and row.expires_at <= now:
        return KeyState.EXPIRED
    return KeyState.ACTIVE


def _to_key(row: KeyRow, holder: PrincipalRow, *, now: datetime) -> ApiKey:
    return ApiKey(
        id=row.id,
        principal=PrincipalId(holder.id),
        kind=holder.kind,
        admin=holder.admin,
        prefix=row.prefix,
        created_at=row.created_at,
        created_by=row.created_by,
        last_used_at=row.last_used_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        state=_state(row, now=now),
    )
