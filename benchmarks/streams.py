"""Timed streaming chats: what a user feels."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True, slots=True)
class Timed:
    """One streamed chat.

    Attributes:
        ttft_seconds: from sending the request to the first chunk with text.
        total_seconds: to the end of the stream.
        completion_tokens: as the server counted them.
        cached_tokens: prompt tokens that were not computed, as the server counted them.
        activation: the connector's own report, `{}` for plain requests.
        text: the answer.
    """

    ttft_seconds: float
    total_seconds: float
    completion_tokens: int
    cached_tokens: int
    activation: Mapping[str, Any]
    text: str


def timed_chat(
    client: httpx.Client, messages: list[dict[str, Any]], *, max_tokens: int = 8, **body: Any
) -> Timed:
    """Stream one greedy chat and time its first token."""
    request = {
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **body,
    }
    started = time.perf_counter()
    first, text, last = None, "", {}
    with client.stream("POST", "/v1/chat/completions", json=request) as reply:
        if reply.status_code != httpx.codes.OK:
            raise RuntimeError(f"HTTP {reply.status_code}: {reply.read().decode()}")
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"])
            piece = "".join(c["delta"].get("content") or "" for c in chunk["choices"])
            if piece and first is None:
                first = time.perf_counter() - started
            text += piece
            last = chunk if chunk.get("usage") else last
    usage = last.get("usage") or {}
    return Timed(
        ttft_seconds=first if first is not None else time.perf_counter() - started,
        total_seconds=time.perf_counter() - started,
        completion_tokens=usage.get("completion_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        activation=last.get("memos", {}).get("activation", {}),
        text=text,
    )


def metric(client: httpx.Client, name: str) -> float:
    """The sum over all labels of a Prometheus metric; 0 when it is not there yet."""
    total = 0.0
    for line in client.get("/metrics").text.splitlines():
        if line.startswith((name + "{", name + " ")):
            total += float(line.rpartition(" ")[2])
    return total
