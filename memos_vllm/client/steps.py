"""What a flow may ask its driver for."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import IO, TypeAlias, TypeVar

import httpx

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request; with `stream` the body is left unread."""

    request: httpx.Request
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Drain:
    """Read the body of a streamed response to its end."""

    response: httpx.Response


@dataclass(frozen=True, slots=True)
class Save:
    """Write the body of a streamed response to a file, and close it.

    Args:
        on_bytes: told how many bytes there are so far.
    """

    response: httpx.Response
    file: IO[bytes]
    on_bytes: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """Do something that takes a while; a client that is awaited does it in a thread."""

    act: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Pause:
    seconds: float


Step: TypeAlias = Send | Drain | Save | Work | Pause
# Yields steps, is sent the response after a Send or a Drain, and returns a T.
Flow: TypeAlias = Generator[Step, httpx.Response | None, T]
