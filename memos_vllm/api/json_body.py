"""Reading a request's JSON within bounds, and strictly.

What strings and numbers may hold is the domain's business (`memos_vllm.domain.checks`).
"""

from __future__ import annotations

import json
from typing import NoReturn

import anyio.to_thread
from fastapi import Request

from memos_vllm.errors import InvalidRequest, TooLarge

MAX_BODY_BYTES = 128 * 1024 * 1024
"""A thousand memories of 64 KiB, all of it escaped at twice its size, and their fields."""

# Parsing this takes about 10 ms; more than that the event loop, which streams answers, never waits.
_LARGE_BYTES = 1024 * 1024


class JsonRequest(Request):
    """A request whose body was read and parsed before FastAPI looks at it.

    FastAPI turns any exception of a body that it reads itself into one vague message.
    """

    _body: bytes
    _json: object

    @classmethod
    async def read(
        cls, request: Request, *, parse: bool = True, max_bytes: int = MAX_BODY_BYTES
    ) -> JsonRequest:
        """Read and parse the body; an empty one is left to the route's own rules.

        Args:
            parse: False for a route that takes no body and only bounds what it is sent.

        Raises:
            TooLarge: over `max_bytes`; nothing past the limit is read.
            InvalidRequest: another content type, or broken JSON.
        """
        parsed = cls(request.scope, request.receive)
        parsed._body = await _read_limited(request, max_bytes)
        if parse and parsed._body:
            _require_json(request)
            if len(parsed._body) > _LARGE_BYTES:
                parsed._json = await anyio.to_thread.run_sync(parse_json, parsed._body)
            else:
                parsed._json = parse_json(parsed._body)
        return parsed


def parse_json(body: bytes) -> object:
    """Parse a UTF-8 JSON text.

    Raises:
        InvalidRequest: not JSON; NaN and a member that is named twice are not JSON here.
    """
    try:
        value: object = json.loads(
            body.decode("utf-8"),
            parse_constant=_no_constant,
            object_pairs_hook=_unique,
        )
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} is wrong") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    except ValueError as error:
        # Python's own says how to lift it.
        too_long = "integer string conversion" in str(error)
        why = "it holds a number of more than 4,300 digits" if too_long else error
        raise InvalidRequest(f"the body is not valid JSON: {why}") from error
    return value


async def _read_limited(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the body is over the limit of {max_bytes} bytes; send it in several requests")


def _require_json(request: Request) -> None:
    content_type = request.headers.get("content-type", "")
    if content_type.split(";", 1)[0].strip().lower() != "application/json":
        raise InvalidRequest(
            "the body must be JSON: send the header 'Content-Type: application/json'"
        )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object names the same member twice")
    return value
