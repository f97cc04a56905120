"""Worker threads for one kind of blocking work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import anyio
import anyio.to_thread

from memos_vllm.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")

_RETRY_AFTER_SECONDS = 5


class Threads:
    """So many calls run at once; those beyond wait, in the order in which they came.

    Args:
        waiting: how many may wait; any number when None.
        refusal: what is said to those beyond.
    """

    def __init__(self, number: int, *, waiting: int | None = None, refusal: str = "") -> None:
        self._limiter = anyio.CapacityLimiter(number)
        self._room = None if waiting is None else number + waiting
        self._refusal = refusal
        self._inside = 0

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in a worker thread, off the event loop that streams answers.

        Raises:
            Unavailable: too many wait already.
        """
        # The limiter's own count of who waits lags behind: one gets in line only some steps later.
        if self._room is not None and self._inside >= self._room:
            raise Unavailable(self._refusal, retry_after_seconds=_RETRY_AFTER_SECONDS)
        self._inside += 1
        try:
            return await anyio.to_thread.run_sync(
                partial(function, *args, **kwargs), limiter=self._limiter
            )
        finally:
            self._inside -= 1
