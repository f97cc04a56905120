"""Timed streaming chats: what a user feels."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from memos_vllm.errors import MemosError


class ChatFailed(MemosError):
    """The server refused a chat, broke its stream off, or cannot be reached."""


@contextmanager
def expecting_answer(path: str) -> Iterator[None]:
    """Have a server that cannot be reached raise ChatFailed, as one that refuses does."""
    try:
        yield
    except httpx.HTTPError as error:
        raise ChatFailed(f"{path}: no answer: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True)
class Timed:
    """One streamed chat.

    Attributes:
        ttft_seconds: from sending the request to the first chunk with text.
        total_seconds: to the end of the stream.
        prompt_tokens, completion_tokens: as the server counted them.
        cached_tokens: prompt tokens that were not computed, as the server counted them.
        activation: the connector's own report, `{}` for plain requests.
        text: the answer.
    """

    ttft_seconds: float
    total_seconds: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    activation: Mapping[str, Any]
    text: str


def timed_chat(
    client: httpx.Client, messages: Sequence[Mapping[str, Any]], *, max_tokens: int = 8, **body: Any
) -> Timed:
    """Stream one greedy chat and time its first token.

    Raises:
        ChatFailed: with what the server said, or why it cannot be reached.
    """
    request = {
        "messages": list(messages),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **body,
    }
    started = time.perf_counter()
    first, text = None, ""
    usage: dict[str, Any] = {}
    memos: dict[str, Any] = {}
    path = "/v1/chat/completions"
    with expecting_answer(path), client.stream("POST", path, json=request) as reply:
        if reply.status_code != httpx.codes.OK:
            raise ChatFailed(f"HTTP {reply.status_code}: {reply.read().decode()}")
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ChatFailed(str(chunk["error"]))
            piece = "".join(c["delta"].get("content") or "" for c in chunk["choices"])
            if piece and first is None:
                first = time.perf_counter() - started
            text += piece
            usage = chunk.get("usage") or usage
            memos = chunk.get("memos") or memos
    return Timed(
        ttft_seconds=first if first is not None else time.perf_counter() - started,
        total_seconds=time.perf_counter() - started,
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        activation=memos.get("activation", {}),
        text=text,
    )
