"""Who sent a request: the key in its `Authorization` header, looked up under a short lease.

Before the first key the server serves only its own machine, and everyone there is the local
administrator; whatever a client sends as a key is then ignored, as clients of plain vLLM have to
send something. From the first key on every request needs one, for good: a process that has seen
the catalog with a key never opens again, whatever the catalog says later.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from starlette.types import Scope

from memos_vllm.api.threads import Threads
from memos_vllm.control.keys import LEASE_SECONDS, USE_PRECISION
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN, Principal
from memos_vllm.domain.keys import KeyHolder, digest_of, is_token
from memos_vllm.errors import MemosError, Unauthenticated, Unavailable

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Value = TypeVar("Value")

GRACE_SECONDS = 60.0
"""How long, after its last look-up, a known key is honoured while the catalog is down. One that is
only slow may have revoked it a moment ago: then nobody gets in."""

STATE = "memos_authenticator"
"""Where the app's state holds the authenticator."""

_PRINCIPAL = "memos_principal"
_LOOKUP_SECONDS = 2.0
_MAX_WAITING = 256
_MAX_REMEMBERED = 4096
# Uses are written down together, this long after the first of them.
_BATCH_SECONDS = 2.0
_BEARER = re.compile(rb"bearer +([\x21-\x7e]+) *", re.IGNORECASE)
_ANY_KEY = b""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question to the catalog that is under way, and when it was put."""

    task: asyncio.Task[Any]
    at: float


class _Slow(Unavailable):
    """The catalog is there, and its answer was too long in coming to be believed."""


class Authenticator:
    """One per API process. Not thread-safe: for the event loop.

    Args:
        mos: the catalog service; raises Unavailable until it has started.
        is_down: whether it is away, and not only slow; may block.
        clock: seconds that only grow.
        now: the time, with a zone.
    """

    def __init__(
        self,
        mos: Callable[[], Mos],
        *,
        is_down: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        batch_seconds: float = _BATCH_SECONDS,
    ) -> None:
        self._mos = mos
        self._is_down = is_down
        self._clock = clock
        self._now = now
        self._batch_seconds = batch_seconds
        # Apart from each other and from the catalog's readers: a flood of made-up keys must hold
        # up neither reads nor the look-up that learns of a revocation.
        self._regulars = Threads(2)
        self._strangers = Threads(
            2, waiting=_MAX_WAITING, refusal="too many unknown keys are looked up; try again"
        )
        self._holders: OrderedDict[bytes, tuple[KeyHolder, float]] = OrderedDict()
        self._refused: OrderedDict[bytes, float] = OrderedDict()
        self._asked: dict[bytes, _Asked] = {}
        self._failed_until = -math.inf
        self._failed: Callable[[], Unavailable] = _down
        self._looking: _Asked | None = None
        self._closed = False
        self._open_at = -math.inf
        self._used: set[str] = set()
        self._recording: asyncio.Task[None] | None = None

    async def principal(self, scope: Scope) -> Principal:
        """Who sent the request.

        Raises:
            Unauthenticated: no key or more than one, or one that is malformed, unknown, revoked
                or expired: one answer for all.
            Unavailable: the catalog is down, or not started, and this key is not known; or it
                takes long.
        """
        token = _token(scope)
        if not self._closed and await self._is_open(believed=token is None):
            return LOCAL_ADMIN
        if token is None:
            raise Unauthenticated
        holder = await self._holder(digest_of(token))
        if holder is None or (holder.expires_at is not None and holder.expires_at <= self._now()):
            raise Unauthenticated
        return holder.principal

    async def _is_open(self, *, believed: bool) -> bool:
        """Whether there was never a key, as the catalog says.

        While the catalog is down nobody can make one: what was open stays open.

        Args:
            believed: under the same lease as a key; not when somebody shows what looks like one.
        """
        if believed and self._clock() - self._open_at < LEASE_SECONDS:
            return True
        try:
            some, at = await self._ask(_ANY_KEY, self._regulars, self._mos().has_keys)
            if some:
                self._closed = True
            else:
                self._open_at = at
        except _Slow:
            raise
        except Unavailable:
            if math.isinf(self._open_at):
                raise
        return not self._closed

    async def _holder(self, digest: bytes) -> KeyHolder | None:
        now = self._clock()
        known, at = self._holders.get(digest, (None, -math.inf))
        if now - at < LEASE_SECONDS:
            return known
        if now - self._refused.get(digest, -math.inf) < LEASE_SECONDS:
            return None
        threads = self._strangers if known is None else self._regulars
        try:
            holder, at = await self._ask(digest, threads, self._mos().authenticate, digest)
        except _Slow:
            raise
        except Unavailable:
            if now - at > GRACE_SECONDS:
                raise
            return known
        if holder is None:
            self._holders.pop(digest, None)
            _remember(self._refused, digest, at)
        else:
            _remember(self._holders, digest, (holder, at))
            self._note_use(holder)
        return holder

    async def _ask(
        self,
        name: bytes,
        threads: Threads,
        question: Callable[..., Answer],
        *arguments: object,
    ) -> tuple[Answer, float]:
        """Ask the catalog for a bounded time, once for all who want to know the same now.

        Returns:
            The answer, and when the question was put: an answer that took long is not believed
            for longer.
        Raises:
            _Slow: it does not answer, or did not a moment ago, and is there all the same.
            Unavailable: it is down, or was a moment ago.
        """
        at = self._clock()
        if at < self._failed_until:
            raise self._failed()
        try:
            try:
                return await self._put(at - LEASE_SECONDS, name, threads, question, *arguments)
            except _Slow:
                away, at = await self._look()
                if away:
                    raise _down() from None
            # It has come back meanwhile, or is slow.
            return await self._put(at, name, threads, question, *arguments)
        except Unavailable as error:
            if threads is self._regulars:
                slow = isinstance(error, _Slow)
                self._failed = _slow if slow else _down
                self._failed_until = (self._clock() if slow else at) + LEASE_SECONDS
            raise

    async def _put(
        self,
        since: float,
        name: bytes,
        threads: Threads,
        question: Callable[..., Answer],
        *arguments: object,
    ) -> tuple[Answer, float]:
        """As `_ask`, once; what raises _Slow may also be down.

        Args:
            since: a question that was put before is put again.
        """
        asked = self._asked.get(name)
        if asked is None or asked.at < since:
            task = asyncio.create_task(threads.run(question, *arguments))
            asked = self._asked[name] = _Asked(task, self._clock())
            task.add_done_callback(lambda done: self._forget(name, done))
        # It is not cancelled: others may wait for it, and its thread cannot be stopped.
        await asyncio.wait({asked.task}, timeout=_LOOKUP_SECONDS)
        if not asked.task.done():
            raise _slow()
        try:
            answer: Answer = asked.task.result()
        except Unavailable:
            # That it is down is believed for as long as any other answer.
            if self._clock() - asked.at > LEASE_SECONDS:
                raise _slow() from None
            raise
        return answer, asked.at

    async def _look(self) -> tuple[bool, float]:
        """Whether the catalog is away, and since when that is known; for all who ask now."""
        if self._looking is None or self._looking.task.done():
            task = asyncio.create_task(asyncio.to_thread(self._is_down))
            self._looking = _Asked(task, self._clock())
        looking = self._looking
        return bool(await asyncio.shield(looking.task)), looking.at

    def _forget(self, name: bytes, done: asyncio.Task[Any]) -> None:
        if not done.cancelled():
            # Looked at, or asyncio would complain of a failure that nobody waited for.
            done.exception()
        if name in self._asked and self._asked[name].task is done:
            del self._asked[name]

    def _note_use(self, holder: KeyHolder) -> None:
        last = holder.last_used_at
        if last is not None and self._now() - last < USE_PRECISION:
            return
        self._used.add(holder.key_id)
        if self._recording is None or self._recording.done():
            self._recording = asyncio.create_task(self._record_uses())

    async def _record_uses(self) -> None:
        await asyncio.sleep(self._batch_seconds)
        used, self._used = self._used, set()
        try:
            await self._strangers.run(self._mos().note_key_uses, sorted(used))
        except MemosError as error:
            # The keys' next look-ups say it again.
            logger.debug("memos: the last use of keys was not recorded: %s", error)


def _remember(cache: OrderedDict[bytes, Value], digest: bytes, value: Value) -> None:
    cache[digest] = value
    cache.move_to_end(digest)
    if len(cache) > _MAX_REMEMBERED:
        cache.popitem(last=False)


def _down() -> Unavailable:
    return Unavailable("the catalog, which knows the keys, does not answer; try again")


def _slow() -> Unavailable:
    return _Slow("the catalog, which knows the keys, takes too long to answer; try again")


def authenticator_of(scope: Scope) -> Authenticator:
    """The app's authenticator; raises Unavailable when there is none (yet)."""
    found: Authenticator | None = getattr(scope["app"].state, STATE, None)
    if found is None:
        raise Unavailable(
            "nobody checks keys in this server yet: the memos plugin has not started (VLLM_PLUGINS "
            "must name it)"
        )
    return found


def with_principal(scope: Scope, principal: Principal) -> Scope:
    """The scope with who sent it, for `principal_in`."""
    return {**scope, "state": {**scope.get("state", {}), _PRINCIPAL: principal}}


def principal_in(scope: Scope) -> Principal:
    """Who sent a request that went past the guard."""
    principal: Principal = scope["state"][_PRINCIPAL]
    return principal


def _token(scope: Scope) -> str | None:
    """The one well-formed key of a request."""
    values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
    if len(values) != 1:
        return None
    match = _BEARER.fullmatch(values[0])
    token = None if match is None else match[1].decode("ascii")
    return token if token is not None and is_token(token) else None
