"""What a flow may ask its driver for."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

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
class Pause:
    seconds: float


Step: TypeAlias = Send | Drain | Pause
# Yields steps, is sent the response (None after a Pause), and returns a T.
Flow: TypeAlias = Generator[Step, httpx.Response | None, T]
