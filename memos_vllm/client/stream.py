"""A streamed chat answer: server-sent events in, text deltas out, the facts at the end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

import httpx

from memos_vllm.client.errors import ReplyTimeout, ServerUnreachable, UnexpectedReply, api_error
from memos_vllm.client.fields import Fields
from memos_vllm.client.flow import Awaited, Blocking
from memos_vllm.client.objects import Json
from memos_vllm.client.replies import ChatMemos
from memos_vllm.client.steps import Flow
from memos_vllm.client.wire import error_fields
from memos_vllm.errors import MemosError

DONE = "[DONE]"


class EventDecoder:
    """Cuts bytes into the `data` of server-sent events.

    Not httpx's iter_lines: that also breaks at U+2028 and U+0085, which JSON leaves unescaped.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The data of each event that this chunk completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events = []
        for ended_line in lines:
            line = ended_line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data = []
        return events


class StreamFacts:
    """What a streamed answer has said so far; whole once the iteration has ended."""

    def __init__(self) -> None:
        self._decoder = EventDecoder()
        self._deltas: list[str] = []
        self._ended = False
        self.memos: ChatMemos | None = None
        self.usage: Json = {}
        self.finish_reason: str | None = None
        self.model = ""

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._deltas)

    def _take(self, chunk: bytes) -> list[str]:
        """Account for some bytes and return the text that they add."""
        deltas = []
        for data in self._decoder.feed(chunk):
            if data == DONE:
                self._ended = True
            else:
                deltas += self._take_event(data)
        self._deltas += deltas
        return deltas

    def _take_event(self, data: str) -> list[str]:
        try:
            body: Any = json.loads(data)
        except ValueError:
            raise UnexpectedReply("the server's stream holds an event that is not JSON") from None
        event = Fields(body, "stream chunk")
        error = event.raw.get("error")
        if isinstance(error, dict):
            message, code, param = error_fields(error)
            status = int(code) if code is not None and code.isdigit() else 500
            raise api_error(message, status_code=status, code=code, param=param)
        self.model = event.optional_text("model") or self.model
        self.usage = event.mapping("usage") or self.usage
        if event.raw.get("memos") is not None:
            self.memos = ChatMemos.from_json(event.raw["memos"])
        deltas = []
        for choice in event.each("choices", lambda item: Fields(item, "choice")):
            if choice.count("index", default=0) != 0:
                continue
            self.finish_reason = choice.optional_text("finish_reason") or self.finish_reason
            delta = choice.part("delta").optional_text("content")
            if delta:
                deltas.append(delta)
        return deltas

    def _check_end(self) -> None:
        if not self._ended:
            raise ServerUnreachable("the server's stream broke off before the answer was complete")


def _broken(error: httpx.RequestError) -> MemosError:
    if isinstance(error, httpx.TimeoutException):
        return ReplyTimeout("the server stopped sending in the middle of the answer")
    return ServerUnreachable(
        f"the connection broke while the answer was streaming ({error or type(error).__name__})"
    )


class ChatStream(StreamFacts):
    """Iterate over it for text deltas; then `memos`, `usage` and `finish_reason` are filled.

    It holds a connection until it is read to its end or closed; use it in a `with` block to stop
    early. Closing it makes the server stop generating.
    """

    def __init__(self, response: httpx.Response) -> None:
        super().__init__()
        self._response = response
        self._iterator = self._read()

    def __iter__(self) -> Iterator[str]:
        return self._iterator

    def __next__(self) -> str:
        return next(self._iterator)

    def _read(self) -> Generator[str, None, None]:
        try:
            for chunk in self._response.iter_bytes():
                yield from self._take(chunk)
            self._check_end()
        except httpx.RequestError as error:
            raise _broken(error) from error
        finally:
            self._response.close()

    def close(self) -> None:
        self._iterator.close()
        self._response.close()

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @classmethod
    def open(cls, runner: Blocking, flow: Flow[httpx.Response]) -> ChatStream:
        return cls(runner._run(flow))


class AsyncChatStream(StreamFacts):
    """ChatStream, awaited: the request goes out on `await`, `async with` or the first delta."""

    def __init__(self, runner: Awaited, flow: Flow[httpx.Response]) -> None:
        super().__init__()
        self._runner = runner
        self._flow = flow
        self._response: httpx.Response | None = None
        self._iterator = self._read()

    def __await__(self) -> Generator[Any, None, AsyncChatStream]:
        return self._opened().__await__()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._iterator

    async def __anext__(self) -> str:
        return await anext(self._iterator)

    async def _opened(self) -> AsyncChatStream:
        if self._response is None:
            self._response = await self._runner._run(self._flow)
        return self

    async def _read(self) -> AsyncIterator[str]:
        await self._opened()
        assert self._response is not None
        try:
            async for chunk in self._response.aiter_bytes():
                for delta in self._take(chunk):
                    yield delta
            self._check_end()
        except httpx.RequestError as error:
            raise _broken(error) from error
        finally:
            await self._response.aclose()

    async def aclose(self) -> None:
        self._flow.close()
        if self._response is not None:
            await self._response.aclose()

    async def __aenter__(self) -> AsyncChatStream:
        return await self._opened()

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()
