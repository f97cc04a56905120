"""Calls of `Mos` from other processes: what travels, and how a change happens once.

Whoever carries a call may deliver it again after a crash (Ray does). So every method of `Mos` that
changes the catalog says what a second delivery may do: `exactly_once` ones keep their result, in
the transaction of the change itself, under the call's key, and give it again; `repeatable` ones do
no harm when they run twice. All others only read.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
import types
import typing
import uuid
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ParamSpec, TypeVar

from pydantic import TypeAdapter

from memos_vllm.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")

_MARK = "__memos_delivery__"
# A delivery that comes later than this, after a crash, finds nobody who waits for it.
_REMEMBERED_SECONDS = 120.0
# A change that is delivered later than this is not made: nobody waits for it any more, and before
# long what an earlier delivery did would be forgotten. The rest is for clocks that differ.
_TOO_LATE_SECONDS = 90.0


class Delivery(Enum):
    """What a second delivery of a call may do."""

    READ = "read"
    REPEATABLE = "repeatable"
    EXACTLY_ONCE = "exactly-once"


def exactly_once(method: Callable[P, T]) -> Callable[P, T]:
    """Mark a change whose result is kept, so that a second delivery gives it again.

    The method may use several `Catalog.write` blocks: a call runs them as one transaction.
    """
    setattr(method, _MARK, Delivery.EXACTLY_ONCE)
    return method


def repeatable(method: Callable[P, T]) -> Callable[P, T]:
    """Mark a change that may happen twice: what it leaves behind is the same."""
    setattr(method, _MARK, Delivery.REPEATABLE)
    return method


def delivery_of(method: object) -> Delivery:
    """What a method of `Mos` was marked with."""
    mark: Delivery = getattr(method, _MARK, Delivery.READ)
    return mark


@dataclass(frozen=True, slots=True)
class CallKey:
    """Names one change among all of one principal's.

    Args:
        fingerprint: of what was asked; the same key with another one is a conflict.
        keep_seconds: how long the result is kept.
    """

    principal_id: str
    key: str
    fingerprint: str
    keep_seconds: float

    @classmethod
    def draw(cls) -> CallKey:
        """A key of our own. No client can send it: theirs hold no space."""
        return cls("system", f"call {uuid.uuid4().hex}", "call", _REMEMBERED_SECONDS)


@dataclass(frozen=True, slots=True)
class Call:
    """One method of `Mos` with its arguments; `key` stands with exactly-once ones only.

    Args:
        sent_at: when its caller sent it, in seconds since 1970.
    """

    method: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    key: CallKey | None = None
    sent_at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call returned; `repeated` when an earlier delivery did the work."""

    value: Any
    repeated: bool = False


@dataclass(slots=True)
class Asked:
    """One change that a client named by a key of its own."""

    key: CallKey
    used: bool = False
    repeated: bool = False


_asked: ContextVar[Asked | None] = ContextVar("memos_asked", default=None)


@contextlib.contextmanager
def asked_under(key: CallKey) -> Iterator[Asked]:
    """The one change that is made within the block has this key."""
    asked = Asked(key)
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


class Remote:
    """Stands in for an object that lives in another process: its methods, called there.

    Args:
        kind: the object's class; nothing else than its public methods can be called.
        send: delivers a call and brings back its outcome; raises what the method raised.
        stream: delivers a call of a generator method and brings back its values, one by one.
    """

    def __init__(
        self,
        kind: type,
        *,
        send: Callable[[Call, Delivery], Outcome],
        stream: Callable[[Call], Iterator[Any]],
    ) -> None:
        self._kind = kind
        self._send = send
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(self._kind, name)
        if inspect.isgeneratorfunction(method):
            return lambda *args, **kwargs: self._stream(Call(name, args, kwargs))
        if isinstance(method, property):
            return self._send(Call(name), Delivery.READ).value
        return functools.partial(self._call, name, delivery_of(method))

    def _call(self, name: str, delivery: Delivery, /, *args: Any, **kwargs: Any) -> Any:
        if delivery is not Delivery.EXACTLY_ONCE:
            return self._send(Call(name, args, kwargs), delivery).value
        asked = _asked.get()
        if asked is None:
            return self._send(Call(name, args, kwargs, CallKey.draw()), delivery).value
        assert not asked.used, "one key names one change"
        asked.used = True
        outcome = self._send(Call(name, args, kwargs, asked.key), delivery)
        asked.repeated = outcome.repeated
        return outcome.value


def perform(target: Any, call: Call) -> Outcome:
    """Run a call on the object itself.

    Raises:
        Unavailable: it is a change that comes much later than it was sent, as to an actor that
            was cut off and lives on while another has taken its place.
        Whatever the method raises; nothing was changed then.
    """
    if delivery_of(getattr(type(target), call.method, None)) is not Delivery.READ:
        late = time.time() - call.sent_at
        if late > _TOO_LATE_SECONDS:
            raise Unavailable(
                f"{call.method} was delivered {late:.0f} s after it was sent, and not done; try "
                "again, and if that goes on set the clocks of the cluster's nodes"
            )
    if call.key is not None:
        outcome: Outcome = target.run_once(call)
        return outcome
    found = getattr(target, call.method)
    return Outcome(found(*call.args, **call.kwargs) if callable(found) else found)


def encode_result(method: Callable[..., Any], value: object) -> bytes:
    """The result of an exactly-once method as JSON, by the type that it declares."""
    return _codec(_plain(method)).dump_json(value)


def decode_result(method: Callable[..., Any], body: bytes) -> Any:
    """What `encode_result` was given."""
    return _codec(_plain(method)).validate_json(body)


def _plain(method: Callable[..., Any]) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(method, "__func__", method)
    return function


@functools.cache
def _codec(function: Callable[..., Any]) -> TypeAdapter[Any]:
    # Only what is returned: other annotations may name what their module does not import.
    returned = types.SimpleNamespace(__annotations__={"return": function.__annotations__["return"]})
    return TypeAdapter(typing.get_type_hints(returned, function.__globals__)["return"])
