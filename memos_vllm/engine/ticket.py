"""Tickets: what permits one request to read and keep a cube's KV.

The API server signs a ticket for each memory request and puts it into the request's
`kv_transfer_params`; the scheduler half of the connector acts on nothing else. A ticket is
bound to one request id and one cache salt, lives for minutes, and is taken once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from memos_vllm.errors import TicketRejected

TICKET_KEY = "memos"
_VERSION = 1
_MAX_TICKET_CHARS = 2048
# vLLM appends eight random characters to the id that the API server chose, and puts the
# index of each of n>1 parallel samples in front of it.
_RANDOM_SUFFIX = re.compile(r"-[0-9a-zA-Z]{8}\Z")
_PARALLEL_SAMPLE = re.compile(r"(?s)\A(?P<index>\d{1,6})_(?P<id>.+)\Z")


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a request may do.

    Attributes:
        request_digest: digest of the id that the API server gave the request.
        samples: how many parallel samples may use the ticket (OpenAI's `n`).
        scope: where artifacts are looked up and saved.
        salt_digest: digest of the cache salt that the request must carry.
        head_tokens: length of the prompt's head that is memory, in tokens.
        save: keep the head in the store when it is not there yet.
        retry_save: try even when saving it failed a moment ago.
        session: names a conversation whose blocks are kept resident too, or None.
        expires_at: Unix time, seconds.
        nonce: makes the ticket unique.
    """

    request_digest: str
    samples: int
    scope: str
    salt_digest: str
    head_tokens: int
    save: bool
    retry_save: bool
    session: str | None
    expires_at: float
    nonce: str


def digest(text: str) -> str:
    """A short fixed-size stand-in for a request id or a cache salt."""
    # JSON may hold half of a surrogate pair, which plain UTF-8 refuses.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class TicketSigner:
    """Signs tickets in the API server."""

    def __init__(
        self, key: bytes, *, ttl_seconds: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._key = key
        self._ttl_seconds = ttl_seconds
        self._clock = clock

    def sign(
        self,
        *,
        request_id: str,
        samples: int,
        scope: str,
        cache_salt: str,
        head_tokens: int,
        save: bool,
        retry_save: bool = False,
        session: str | None = None,
    ) -> str:
        ticket = Ticket(
            request_digest=digest(request_id),
            samples=samples,
            scope=scope,
            salt_digest=digest(cache_salt),
            head_tokens=head_tokens,
            save=save,
            retry_save=retry_save,
            session=None if session is None else digest(session),
            expires_at=self._clock() + self._ttl_seconds,
            nonce=secrets.token_hex(16),
        )
        payload = json.dumps({"v": _VERSION, **asdict(ticket)}, separators=(",", ":")).encode()
        return _b64(payload) + "." + _b64(_mac(self._key, payload))


class TicketVerifier:
    """Takes tickets in the engine, each at most once per sample."""

    def __init__(self, key: bytes, *, clock: Callable[[], float] = time.time) -> None:
        self._key = key
        self._clock = clock
        # nonce -> (expiry, sample indexes that used it); ordered by first use.
        self._used: dict[str, tuple[float, set[int]]] = {}

    def take(self, token: object, *, request_id: str, cache_salt: str | None) -> Ticket:
        """Check a ticket against the request that carries it and mark it used.

        Raises:
            TicketRejected: anything about it is wrong; the reason names no secret.
        """
        ticket = self._authentic(token)
        if ticket.expires_at < self._clock():
            raise TicketRejected("expired")
        if cache_salt is None or digest(cache_salt) != ticket.salt_digest:
            raise TicketRejected("bound to another cache salt")
        index = _sample_index(request_id, ticket)
        self._forget_expired()
        _, samples = self._used.setdefault(ticket.nonce, (ticket.expires_at, set()))
        if index in samples:
            raise TicketRejected("already used")
        samples.add(index)
        return ticket

    def _authentic(self, token: object) -> Ticket:
        if not isinstance(token, str) or len(token) > _MAX_TICKET_CHARS or token.count(".") != 1:
            raise TicketRejected("not a ticket")
        encoded_payload, encoded_mac = token.split(".")
        try:
            payload, mac = _unb64(encoded_payload), _unb64(encoded_mac)
        except (binascii.Error, ValueError) as error:
            raise TicketRejected("not a ticket") from error
        if not hmac.compare_digest(_mac(self._key, payload), mac):
            raise TicketRejected("forged, or signed with another key")
        fields = json.loads(payload)
        if fields.pop("v", None) != _VERSION:
            raise TicketRejected("made by another version")
        return Ticket(**fields)

    def _forget_expired(self) -> None:
        now = self._clock()
        while self._used:
            nonce, (expires_at, _) = next(iter(self._used.items()))
            if expires_at >= now:
                return
            del self._used[nonce]


def _sample_index(request_id: str, ticket: Ticket) -> int:
    """Which of the ticket's parallel samples this engine request is."""
    index, base = 0, request_id
    if ticket.samples > 1:
        parallel = _PARALLEL_SAMPLE.match(request_id)
        if parallel is None or int(parallel["index"]) >= ticket.samples:
            raise TicketRejected("bound to another request")
        index, base = int(parallel["index"]), parallel["id"]
    without_random = _RANDOM_SUFFIX.sub("", base)
    if ticket.request_digest not in (digest(base), digest(without_random)):
        raise TicketRejected("bound to another request")
    return index


def _mac(key: bytes, payload: bytes) -> bytes:
    return hmac.new(key, b"memos-ticket" + payload, hashlib.sha256).digest()


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
