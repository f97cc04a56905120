"""Calls are written once, as generators that ask for IO; a blocking or an awaited driver does it.

A *flow* yields what it needs done (`Send`, `Drain`, `Save`, `Work`, `Pause`) and gets the response
back, or the httpx error thrown into it. Retries, polling and paging are flows too, so both clients
share them.
`operation` and `listing` turn methods that return flows into the public methods of `MOS` and
`Cube` (which block) and of `AsyncMOS` and `AsyncCube` (which are awaited).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import IO, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import httpx

from memos_vllm.client.errors import UnexpectedReply
from memos_vllm.client.objects import Page
from memos_vllm.client.session import Session
from memos_vllm.client.steps import Drain, Flow, Pause, Save, Send, Step, Work

P = ParamSpec("P")
T = TypeVar("T")


class Blocking:
    """Runs flows on a blocking httpx client."""

    def __init__(self, session: Session, http: httpx.Client) -> None:
        self._session = session
        self._http = http

    def _run(self, flow: Flow[T]) -> T:
        try:
            step = next(flow)
            while True:
                try:
                    response = self._perform(step)
                except httpx.RequestError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(response)
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            flow.close()

    def _perform(self, step: Step) -> httpx.Response | None:
        match step:
            case Send(request, stream):
                return self._http.send(request, stream=stream)
            case Drain(response):
                response.read()
                return response
            case Save(response, file, on_bytes):
                with contextlib.closing(response):
                    for chunk in response.iter_bytes():
                        _put_down(file, chunk, on_bytes)
                return None
            case Work(act):
                act()
                return None
            case Pause(seconds):
                time.sleep(seconds)
                return None

    def _each(self, listing: Listing[T]) -> Iterator[T]:
        pages = listing.pages()
        while (page := self._run(pages.next())) is not None:
            yield from page


class Awaited:
    """Runs flows on an asynchronous httpx client."""

    def __init__(self, session: Session, http: httpx.AsyncClient) -> None:
        self._session = session
        self._http = http

    async def _run(self, flow: Flow[T]) -> T:
        try:
            step = next(flow)
            while True:
                try:
                    response = await self._perform(step)
                except httpx.RequestError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(response)
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            flow.close()

    async def _perform(self, step: Step) -> httpx.Response | None:
        match step:
            case Send(request, stream):
                return await self._http.send(request, stream=stream)
            case Drain(response):
                await response.aread()
                return response
            case Save(response, file, on_bytes):
                async with contextlib.aclosing(response):
                    async for chunk in response.aiter_bytes():
                        _put_down(file, chunk, on_bytes)
                return None
            case Work(act):
                await asyncio.to_thread(act)
                return None
            case Pause(seconds):
                await asyncio.sleep(seconds)
                return None

    async def _each(self, listing: Listing[T]) -> AsyncIterator[T]:
        pages = listing.pages()
        while (page := await self._run(pages.next())) is not None:
            for item in page:
                yield item


def _put_down(file: IO[bytes], chunk: bytes, on_bytes: Callable[[int], None] | None) -> None:
    file.write(chunk)
    if on_bytes is not None:
        on_bytes(file.tell())


@dataclass(frozen=True, slots=True)
class Listing(Generic[T]):
    """A list that the server gives in pages.

    Args:
        fetch: the flow of one page, from a page size and a cursor.
        limit: at most this many items in all; None for every one.
        page_size: at most this many in one request.
    """

    fetch: Callable[[int, str | None], Flow[Page[T]]]
    limit: int | None = None
    page_size: int = 200

    def pages(self) -> _Pages[T]:
        return _Pages(self)


class _Pages(Generic[T]):
    """Where an iteration over a listing stands."""

    def __init__(self, listing: Listing[T]) -> None:
        self._listing = listing
        self._left = listing.limit
        self._cursor: str | None = None
        self._started = False

    def next(self) -> Flow[tuple[T, ...] | None]:
        """The items of the next page, None after the last one."""
        if (self._started and self._cursor is None) or (self._left is not None and self._left <= 0):
            return None
        size = self._listing.page_size
        if self._left is not None:
            size = min(size, self._left)
        page = yield from self._listing.fetch(size, self._cursor)
        if page.next_cursor is not None and page.next_cursor == self._cursor:
            raise UnexpectedReply("the server's list repeats its cursor and would never end")
        self._started, self._cursor = True, page.next_cursor
        if self._left is None:
            return page.items
        items = page.items[: self._left]
        self._left -= len(items)
        return items


class operation(Generic[P, T]):  # noqa: N801 - it is used as a decorator, like property
    """A method that returns a flow becomes one that returns the flow's result, or awaits it."""

    def __init__(self, build: Callable[Concatenate[Any, P], Flow[T]]) -> None:
        @functools.wraps(build)
        def method(instance: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
            return instance._run(build(instance, *args, **kwargs))

        self._method = method
        self.__doc__ = build.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, instance: Blocking, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, instance: Awaited, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, instance: object | None, owner: type) -> Callable[..., Any]:
        return self._method if instance is None else MethodType(self._method, instance)


class listing(Generic[P, T]):  # noqa: N801 - it is used as a decorator, like property
    """A method that returns a Listing becomes an iterator over all of its items."""

    def __init__(self, build: Callable[Concatenate[Any, P], Listing[T]]) -> None:
        @functools.wraps(build)
        def method(instance: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
            return instance._each(build(instance, *args, **kwargs))

        self._method = method
        self.__doc__ = build.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, instance: Blocking, owner: type) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, instance: Awaited, owner: type) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(self, instance: object | None, owner: type) -> Callable[..., Any]:
        return self._method if instance is None else MethodType(self._method, instance)
