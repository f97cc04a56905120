"""Puts the `memos` object into a stream of chat completion chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

_DONE = "data: [DONE]"
_NO_CHOICES = '"choices":[]'


async def with_memos(
    events: AsyncIterator[str], memos: Callable[[], Awaitable[dict[str, Any]]]
) -> AsyncIterator[str]:
    """Add `memos` to the chunk that carries the usage, or to one of its own before the end.

    Only a chunk without choices, which is the usage chunk, is held back until the stream has
    ended; every other event passes through untouched and at once.
    """
    usage: str | None = None
    template: dict[str, Any] = {}
    async for event in events:
        if event.startswith(_DONE):
            yield _chunk(usage, template, await memos())
            usage = None
            yield event
        elif _NO_CHOICES in event:
            if usage is not None:
                yield usage
            usage = event
        else:
            if not template:
                template = _identity(event)
            yield event
    if usage is not None:
        # The stream broke off; what was held back is still the caller's.
        yield usage


async def heard(events: AsyncIterator[str], into: list[str]) -> AsyncIterator[str]:
    """Pass events on, and add to `into` what the first choice says in them."""
    async for event in events:
        if '"content"' in event:
            into.append(_said(event))
        yield event


def _said(event: str) -> str:
    try:
        chunk = json.loads(event.removeprefix("data: "))
        choice = chunk["choices"][0]
        return str(choice["delta"]["content"] or "") if choice["index"] == 0 else ""
    except (ValueError, LookupError, TypeError):
        return ""


def _identity(event: str) -> dict[str, Any]:
    """The fields that every chunk of a stream shares; empty for an error event."""
    try:
        chunk = json.loads(event.removeprefix("data: "))
    except json.JSONDecodeError:
        return {}
    if not isinstance(chunk, dict):
        return {}
    return {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}


def _chunk(usage: str | None, template: dict[str, Any], memos: dict[str, Any]) -> str:
    chunk = (
        json.loads(usage.removeprefix("data: "))
        if usage is not None
        else {"object": "chat.completion.chunk", **template, "choices": []}
    )
    chunk["memos"] = memos
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
