"""What the server's process and the process of the embedded index say to each other, pickled."""

from __future__ import annotations

from dataclasses import dataclass, field
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
