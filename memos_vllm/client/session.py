"""What all calls of one client share: address, key, timeouts and when to try again."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import httpx

from memos_vllm.client.errors import ReplyTimeout, ServerUnreachable, UnexpectedReply
from memos_vllm.client.steps import Drain, Flow, Pause, Send
from memos_vllm.client.wire import (
    Call,
    authorization,
    encode_body,
    read_error,
    read_reply,
    retry_after_seconds,
    server_url,
)
from memos_vllm.errors import ConfigurationError

T = TypeVar("T")

CONNECT_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a call that may be repeated is sent again after a connection error or a 503.

    Args:
        attempts: how often in all.
        base_seconds: the first pause; it doubles, with jitter, up to `max_seconds`.
        max_seconds: a server that asks for a longer Retry-After is not waited for.
    """

    attempts: int = 4
    base_seconds: float = 0.2
    max_seconds: float = 10.0

    def pause_seconds(self, attempt: int, *, jitter: float) -> float:
        """The pause after the given attempt, counted from 1; jitter is from 0 to 1."""
        longest = min(self.max_seconds, self.base_seconds * 2.0 ** (attempt - 1))
        return longest * (0.5 + jitter / 2)


class Session:
    """Builds requests, reads replies and decides on retries; does no IO itself.

    Args:
        timeout_seconds: longest wait for a part of an ordinary reply.
        chat_timeout_seconds: the same while text is generated or a document is read.
    Raises:
        ConfigurationError: the address, the key or a timeout cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        timeout_seconds: float,
        chat_timeout_seconds: float,
        retry: RetryPolicy,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if timeout_seconds <= 0 or chat_timeout_seconds <= 0:
            raise ConfigurationError("a timeout is a number of seconds above 0")
        self.base_url = server_url(base_url)
        self.clock = clock
        # The served model, once it was asked for.
        self.model: str | None = None
        self._headers = {
            "Accept": "application/json",
            "User-Agent": "memos-vllm-python",
            **authorization(api_key),
        }
        self._timeout = httpx.Timeout(timeout_seconds, connect=CONNECT_TIMEOUT_SECONDS)
        self._chat_timeout = httpx.Timeout(chat_timeout_seconds, connect=CONNECT_TIMEOUT_SECONDS)
        self._retry = retry
        self._jitter = jitter

    @property
    def is_loopback(self) -> bool:
        host = self.base_url.host
        return host in {"localhost", "::1"} or host.startswith("127.")

    def call(self, call: Call[T]) -> Flow[T]:
        """Send a call, again if it may be, and read its reply."""
        response, attempts = yield from self._exchange(call, stream=False)
        # A DELETE whose answer was lost finds nothing on its second try: it was done.
        if call.method == "DELETE" and attempts > 1 and response.status_code == 404:
            return call.parse(None)
        return read_reply(call, response)

    def open_stream(self, call: Call[T]) -> Flow[httpx.Response]:
        """Send a call and return its response with the body still to come."""
        response, _ = yield from self._exchange(call, stream=True)
        if response.status_code != 200:
            try:
                yield Drain(response)
            except httpx.RequestError as error:
                raise self._unreachable(error) from error
            if response.status_code < 400:
                raise UnexpectedReply(f"{self.base_url} answered {response.status_code}")
            raise read_error(response)
        return response

    def _exchange(self, call: Call[T], *, stream: bool) -> Flow[tuple[httpx.Response, int]]:
        request = self._request(call)
        attempts = self._retry.attempts if call.repeatable else 1
        for attempt in range(1, attempts + 1):
            last = attempt == attempts
            pause = self._retry.pause_seconds(attempt, jitter=self._jitter())
            try:
                response = yield Send(request, stream)
            except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout) as error:
                raise self._late(call) from error
            except httpx.TransportError as error:
                if last:
                    raise self._unreachable(error) from error
            except httpx.RequestError as error:
                raise UnexpectedReply(f"{self.base_url} sent an unreadable reply") from error
            else:
                assert response is not None
                asked = retry_after_seconds(response, now=datetime.now(UTC))
                pause = max(pause, asked or 0.0)
                wanted = response.status_code == 503 and 503 not in call.accept
                if last or not wanted or pause > self._retry.max_seconds:
                    return response, attempt
            yield Pause(pause)
        raise AssertionError("the last attempt returns or raises")

    def _request(self, call: Call[T]) -> httpx.Request:
        headers = {**self._headers, **call.headers}
        content = data = files = None
        if call.upload is not None:
            data = dict(call.upload.fields)
            files = {"file": (call.upload.filename, call.upload.content)}
        elif call.body is not None:
            content = encode_body(call.body)
            headers["Content-Type"] = "application/json"
        elif call.file is not None:
            headers["Content-Type"] = "application/zstd"
            headers["Content-Length"] = str(call.file.size_bytes)
            # httpx adds it only where it makes the body itself.
            headers["Host"] = self.base_url.netloc.decode("ascii")
        # One key for all attempts: the server does the work once and repeats its answer.
        if call.method == "POST" and call.path.startswith("/v1/memcubes"):
            headers["Idempotency-Key"] = uuid.uuid4().hex
        query = {name: str(value) for name, value in call.query.items() if value is not None}
        # Through raw_path, because httpx would decode the %2F of a quoted identifier's slash.
        path = self.base_url.raw_path.split(b"?")[0].rstrip(b"/") + call.path.encode("ascii")
        if query:
            path += b"?" + str(httpx.QueryParams(query)).encode("ascii")
        timeout = self._chat_timeout if call.slow else self._timeout
        return httpx.Request(
            call.method,
            self.base_url.copy_with(raw_path=path),
            headers=headers,
            content=content,
            data=data,
            files=files,
            stream=call.file,
            extensions={"timeout": timeout.as_dict()},
        )

    def _late(self, call: Call[T]) -> ReplyTimeout:
        seconds = (self._chat_timeout if call.slow else self._timeout).read
        return ReplyTimeout(
            f"{self.base_url} did not answer {call.method} {call.path} within {seconds:g} s"
        )

    def _unreachable(self, error: httpx.RequestError) -> ServerUnreachable:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            reason = "no server answers there; is `memos-vllm serve` running?"
        else:
            reason = f"the connection broke ({error or type(error).__name__})"
        return ServerUnreachable(f"cannot reach {self.base_url}: {reason}")
