"""Reads the fields of a JSON object by type, and says which one is not as the API promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, TypeVar

from memos_vllm.client.errors import UnexpectedReply

T = TypeVar("T")


class Fields:
    """One JSON object of a reply.

    Args:
        body: what was decoded; anything but an object raises.
        kind: what it should be, for messages.
    Raises:
        UnexpectedReply: from any method, for a field that is absent or of another type.
    """

    def __init__(self, body: object, kind: str) -> None:
        if not isinstance(body, Mapping):
            raise UnexpectedReply(f"the server answered {_named(body)} where a {kind} belongs")
        self.raw: Mapping[str, Any] = body
        self._kind = kind

    def text(self, name: str) -> str:
        return self._typed(name, str)

    def optional_text(self, name: str) -> str | None:
        return None if self.raw.get(name) is None else self.text(name)

    def count(self, name: str, *, default: int | None = None) -> int:
        if default is not None and self.raw.get(name) is None:
            return default
        value = self._typed(name, int)
        if isinstance(value, bool):
            raise self._wrong(name, value)
        return value

    def optional_count(self, name: str) -> int | None:
        return None if self.raw.get(name) is None else self.count(name)

    def flag(self, name: str) -> bool:
        return self._typed(name, bool)

    def number(self, name: str, *, default: float | None = None) -> float:
        value = self.raw.get(name)
        if default is not None and value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value)
        return float(value)

    def time(self, name: str) -> datetime:
        value = self._typed(name, str)
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise self._wrong(name, value) from None
        if moment.tzinfo is None:
            raise self._wrong(name, value)
        return moment

    def optional_time(self, name: str) -> datetime | None:
        return None if self.raw.get(name) is None else self.time(name)

    def names(self, name: str) -> tuple[str, ...]:
        """A list of strings; absent or null is empty."""
        values = self.raw.get(name) or []
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self._wrong(name, values)
        return tuple(values)

    def numbers(self, name: str) -> dict[str, float]:
        """An object of numbers; absent or null is empty."""
        values = Fields(self.mapping(name), f"{self._kind}.{name}")
        return {key: values.number(key) for key in values.raw}

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object kept as it is; absent or null is empty."""
        value = self.raw.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self._wrong(name, value)
        return value

    def part(self, name: str) -> Fields:
        """An object within this one; absent or null reads as an empty one."""
        return Fields(self.mapping(name), f"{self._kind}.{name}")

    def each(self, name: str, parse: Callable[[object], T]) -> tuple[T, ...]:
        """A list of objects; absent or null is empty."""
        values = self.raw.get(name) or []
        if not isinstance(values, list):
            raise self._wrong(name, values)
        return tuple(parse(value) for value in values)

    def _typed(self, name: str, wanted: type[T]) -> T:
        value = self.raw.get(name)
        if not isinstance(value, wanted):
            raise self._wrong(name, value)
        return value

    def _wrong(self, name: str, value: object) -> UnexpectedReply:
        if name not in self.raw:
            return UnexpectedReply(f"the server's {self._kind} has no field '{name}'")
        return UnexpectedReply(f"the server's {self._kind} has {_named(value)} in '{name}'")


def _named(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
