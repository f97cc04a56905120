"""Ending as Ctrl-C does: for commands that start servers, which must not outlive them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

# A closed terminal, and `kill`.
_ENDINGS = (signal.SIGTERM, signal.SIGHUP)

Handler = Callable[[int, FrameType | None], None] | signal.Handlers


@contextmanager
def ending_as_interrupt() -> Iterator[None]:
    """Have a closed terminal and `kill` raise KeyboardInterrupt meanwhile."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled(_ENDINGS, interrupt):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore what would end this process: half of a server must not be left behind."""
    with _handled((signal.SIGINT, *_ENDINGS), signal.SIG_IGN):
        yield


@contextmanager
def _handled(numbers: Sequence[signal.Signals], handler: Handler) -> Iterator[None]:
    """Only the main thread has signals to handle."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
