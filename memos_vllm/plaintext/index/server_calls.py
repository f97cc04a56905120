"""Calls of a Qdrant server: time limits, repeats, and errors that say what to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

import httpx
from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from memos_vllm.errors import ConfigurationError, Unavailable

T = TypeVar("T")

_CONNECT_SECONDS = 2.0
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_MAX_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a call may take, and how often it is repeated.

    Every call of ours can be repeated: it says what is to be, not what to add.

    Args:
        answer_seconds: for one try; a whole number, since the client rounds.
        pauses_seconds: before each further try.
        give_up_seconds: no further try begins after this long.
    """

    answer_seconds: int
    pauses_seconds: tuple[float, ...]
    give_up_seconds: float


# A search is waited for by a person; a write by the indexer, which tries again anyway.
READING = Patience(5, (0.05, 0.2), 2.0)
WRITING = Patience(30, (0.1, 0.5, 2.0), 10.0)
# Payload indexes of a large collection take their time; counting exactly does too.
MANAGING = Patience(60, (0.1, 0.5, 2.0), 10.0)


class ServerCalls:
    """A client of one server. Thread-safe.

    Raises:
        ConfigurationError: `url` is no http or https URL.
    """

    def __init__(self, url: str, *, api_key: str | None) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ConfigurationError("the Qdrant URL has no valid port") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(
                "the Qdrant URL must start with http:// or https:// and name a host, "
                "such as http://127.0.0.1:6333"
            )
        # For messages: what stands before an @ may be a password.
        self.address = parts.hostname if port is None else f"{parts.hostname}:{port}"
        self._client = QdrantClient(
            url=url,
            timeout=MANAGING.answer_seconds,
            # `open` asks for the version itself, and says what is wrong with it.
            check_compatibility=False,
            headers=None if api_key is None else {"api-key": api_key},
            event_hooks={"request": [_connect_sooner]},
        )

    def ask(self, action: Callable[[QdrantClient, int], T], patience: Patience) -> T:
        """What `action` returns; it is given the client and the seconds that one try may take.

        Raises:
            Unavailable: the server is down, busy, or refuses this.
        """
        began = time.monotonic()
        pauses = iter(patience.pauses_seconds)
        while True:
            try:
                return action(self._client, patience.answer_seconds)
            except (ResponseHandlingException, ResourceExhaustedResponse, UnexpectedResponse) as e:
                problem, passing = self._problem(e)
                pause = next(pauses, None)
                late = time.monotonic() - began + (pause or 0.0) > patience.give_up_seconds
                if not passing or pause is None or late:
                    raise problem from e
                time.sleep(pause)

    def close(self) -> None:
        """Close connections."""
        self._client.close()

    def _problem(self, error: Exception) -> tuple[Unavailable, bool]:
        """The error to raise, and whether the next try may go better."""
        here = f"Qdrant at {self.address}"
        if isinstance(error, ResourceExhaustedResponse):
            seconds = max(1, error.retry_after_s)
            return Unavailable(f"{here} asks to wait", retry_after_seconds=seconds), False
        if isinstance(error, ResponseHandlingException):
            if isinstance(error.source, httpx.TransportError):
                kind = type(error.source).__name__
                text = f"{here} does not answer ({kind}); check that it runs and can be reached"
                return Unavailable(text, retry_after_seconds=2), True
            text = f"{here} answered something that no Qdrant says; check the URL"
            return Unavailable(text, retry_after_seconds=10), False
        assert isinstance(error, UnexpectedResponse)
        status = error.status_code or 0
        if status in (401, 403):
            text = f"{here} refuses our API key (HTTP {status}); set MEMOS_QDRANT_API_KEY"
            return Unavailable(text, retry_after_seconds=10), False
        text = f"{here} answered HTTP {status}: {_reason(error)}"
        return Unavailable(text, retry_after_seconds=2), status in _BUSY


def _reason(error: UnexpectedResponse) -> str:
    try:
        reason = str(error.structured()["status"]["error"])
    except (ValueError, KeyError, TypeError):
        reason = error.reason_phrase or "no reason given"
    return reason[:_MAX_SHOWN_CHARS]


def _connect_sooner(request: httpx.Request) -> None:
    # The client has one number for all phases; a host that is gone must not take all of it.
    limits = request.extensions.get("timeout")
    if isinstance(limits, dict):
        request.extensions["timeout"] = {**limits, "connect": _CONNECT_SECONDS}
