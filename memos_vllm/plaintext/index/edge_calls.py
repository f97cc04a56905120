"""What the server's process and the process of the embedded index say to each other, pickled."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from memos_vllm.errors import MemosError


@dataclass(frozen=True, slots=True)
class Call:
    """A method of `EdgeHost`, or of one of its collections when `collection` is given."""

    method: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    collection: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call returned or raised."""

    value: Any = None
    error: MemosError | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """What opening a collection found."""

    empty: bool
    made_anew: bool


def send(connection: Connection, message: Call | Answer) -> None:
    """Put a message into the connection; its own `send` pickles twice as slowly."""
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Any:
    """The next message.

    Raises:
        EOFError: the other side is gone.
        OSError: likewise, or nothing came in the time that the socket allows.
    """
    return pickle.loads(connection.recv_bytes())
