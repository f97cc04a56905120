"""Canned answers and a scripted transport for tests of the client; no network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from memos_vllm.client import MOS, AsyncMOS, RetryPolicy

AT = "2026-01-02T03:04:05Z"
URL = "http://127.0.0.1:8000"
# Quick, so that tests of retries take milliseconds.
QUICK = RetryPolicy(attempts=3, base_seconds=0.001, max_seconds=0.05)


def cube_json(cube_id: str = "acme", **changes: object) -> dict[str, object]:
    return {
        "id": cube_id,
        "object": "memcube",
        "name": "",
        "description": "",
        "owner": "local",
        "version": 3,
        "created_at": AT,
        "updated_at": AT,
        "memories": {"active": 2, "merged": 0, "archived": 1},
        "tiers": {"plaintext": 1, "activation": 1, "parametric": 0},
        "activation": {"state": "ready", "tokens": 640, "bytes": 9, "resident_tokens": 512},
        "adapter": None,
        **changes,
    }


def memory_json(memory_id: str = "mem_1", **changes: object) -> dict[str, object]:
    return {
        "id": memory_id,
        "object": "memory",
        "cube_id": "acme",
        "text": "Refunds take five working days.",
        "tags": ["refunds"],
        "labels": [],
        "metadata": {},
        "source": {"kind": "note"},
        "state": "active",
        "tier": "plaintext",
        "version": 1,
        "lineage": {},
        "edges": [],
        "created_by": "local",
        "created_at": AT,
        "updated_at": AT,
        "expires_at": None,
        "usage": {"hits": 4, "last_used_at": None},
        **changes,
    }


def erased_json(memory_id: str) -> dict[str, Any]:
    return {
        "id": memory_id,
        "object": "memory",
        "cube_id": "acme",
        "erased": True,
        "versions_removed": 2,
        "derived": ["mem_2"],
        "job_id": "job_1",
    }


def job_json(state: str, **changes: object) -> dict[str, object]:
    return {
        "id": "job_1",
        "object": "job",
        "cube_id": "acme",
        "kind": "bake",
        "state": state,
        "progress": 0.5,
        "message": "",
        "error": None,
        "created_at": AT,
        "updated_at": AT,
        **changes,
    }


def hit_json(memory_id: str = "mem_1", **changes: object) -> dict[str, object]:
    return {
        "memory": memory_json(memory_id),
        "score": 0.81,
        "scores": {"dense": 0.74, "sparse": 0.9, "graph": 0.0},
        "via": None,
        **changes,
    }


HOP_JSON = {
    "origin": "mem_1",
    "kind": "mentions",
    "forward": False,
    "weight": 0.5,
    "detail": "acme",
}


def document_json(uri: str = "handbook.md", **changes: object) -> dict[str, object]:
    """The whole reply: the chunks as a list, and the document beside it."""
    document = {
        "id": "mem_doc",
        "object": "document",
        "outcome": "added",
        "title": "Handbook",
        "uri": uri,
        "media_type": "text/markdown",
        "digest": "9f" * 32,
        "chunks": 2,
        "added": 2,
        "changed": 0,
        "archived": 0,
        "notes": [],
        **changes,
    }
    return {**list_json(memory_json("mem_1"), memory_json("mem_2")), "document": document}


MEMOS_JSON = {
    "cubes": [{"id": "acme", "version": 3}],
    "activation": {"tokens": 640, "cached_tokens": 512, "source": "resident"},
    "retrieved": [],
    "adapter": None,
}


RECALLED_JSON = {
    **MEMOS_JSON,
    "retrieved": [
        {"id": "mem_1", "score": 0.8, "number": 3, "tokens": 40, "source": "Handbook, page 7"},
        {"id": "mem_2", "score": 0.5, "number": 4, "tokens": 9, "source": None},
    ],
    "remembered": {"memory_ids": ["mem_8", "mem_9"], "job": "job_1"},
    "warnings": ["the index is behind"],
}


def chat_json(text: str = "Five days.", *, memos: object = MEMOS_JSON) -> dict[str, object]:
    return {
        "object": "chat.completion",
        "model": "small",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
        ],
        "usage": {"total_tokens": 9},
        "memos": memos,
    }


def list_json(*items: object, cursor: str | None = None) -> dict[str, object]:
    return {"object": "list", "data": list(items), "next_cursor": cursor}


def error_json(message: str, **fields: object) -> dict[str, object]:
    return {"error": {"message": message, "type": "x", "param": None, "code": None, **fields}}


def sse(*events: object, end: bool = True) -> bytes:
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events]
    return ("".join(lines) + ("data: [DONE]\n\n" if end else "")).encode()


def delta_json(text: str | None, **changes: object) -> dict[str, object]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return {"model": "small", "choices": [choice], **changes}


Answer = httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]


class Script:
    """Answers requests in the order written, and keeps what was asked."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if not isinstance(answer, httpx.Response):
            return answer(request)
        if not answer.is_stream_consumed:
            return answer
        # A new one, as httpx ties a response to the kind of client that it was read by.
        return httpx.Response(answer.status_code, content=answer.content, headers=answer.headers)

    @property
    def paths(self) -> list[str]:
        return [f"{request.method} {request.url.raw_path.decode()}" for request in self.requests]

    def body(self, index: int = -1) -> Any:
        return json.loads(self.requests[index].content)


def reply(status: int, body: object = None, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    if isinstance(body, bytes):
        return httpx.Response(status, content=body, headers=names)
    if body is None:
        return httpx.Response(status, headers=names)
    return httpx.Response(status, json=body, headers=names)


def client(script: Script, **options: Any) -> MOS:
    options.setdefault("retry", QUICK)
    return MOS(URL, transport=httpx.MockTransport(script), **options)


class _Waited:
    """A blocking face on an asynchronous object, so that one test runs against both clients."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target = target
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        return self._wrap_call(value) if callable(value) else value

    def _wrap_call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._settle(function(*args, **kwargs))

        return call

    def _settle(self, value: Any) -> Any:
        if hasattr(value, "__await__"):
            value = self._loop.run_until_complete(_await(value))
        if hasattr(value, "__aiter__"):
            return _WaitedStream(value, self._loop)
        if type(value).__name__ == "AsyncCube":
            return _Waited(value, self._loop)
        return value


class _WaitedStream(_Waited):
    def __iter__(self) -> Iterator[Any]:
        iterator = aiter(self._target)
        while True:
            try:
                yield self._loop.run_until_complete(anext(iterator))
            except StopAsyncIteration:
                return

    def close(self) -> None:
        self._loop.run_until_complete(self._target.aclose())


async def _await(value: Any) -> Any:
    return await value


def waited_client(script: Script, loop: asyncio.AbstractEventLoop, **options: Any) -> Any:
    options.setdefault("retry", QUICK)
    return _Waited(AsyncMOS(URL, transport=httpx.MockTransport(script), **options), loop)
