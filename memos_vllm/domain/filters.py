"""The filter language of searches: what a caller may ask of the memories that are found.

A filter is a JSON object; its keys all apply at once:

    {"tags": "x" | ["x", "y"]}                     any of these tags
    {"tier": "plaintext" | [...]}                  any of these tiers
    {"source": {"kind": "note", "author": [...]}}  kind, uri, title, author, locator
    {"created_at": {"gte": "2025-01-01T00:00:00Z"}}   gte, gt, lte, lt; also updated_at
    {"metadata": {"a.b": 1, "n": {"lt": 3}}}       dotted paths: a value, any of a list, a range
    {"and": [...]}, {"or": [...]}, {"not": {...}}

Values compare exactly, numbers by value (1 equals 1.0, and neither equals true). A memory that
lacks a field matches no condition on it, so it matches the condition's `not`. `created_at` is the
time that the source gives, or else when the memory was added.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeAlias

from memos_vllm.domain.checks import check_encodable
from memos_vllm.domain.memory import Tier
from memos_vllm.domain.scope import FilterFields, Scalar, SourceField
from memos_vllm.errors import InvalidRequest

MAX_DEPTH = 8
MAX_LEAVES = 64
MAX_VALUES = 64
MAX_STRING_CHARS = 2048

TimeField: TypeAlias = Literal["created_at", "updated_at"]

SOURCE_FIELDS: tuple[SourceField, ...] = ("kind", "uri", "title", "author", "locator")
_BOUNDS = ("gte", "gt", "lte", "lt")
_KEYS = ("tags", "tier", "source", "created_at", "updated_at", "metadata", "and", "or", "not")
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")


@dataclass(frozen=True, slots=True)
class Bounds:
    """A range of numbers; an end that is None is open."""

    gte: float | None = None
    gt: float | None = None
    lte: float | None = None
    lt: float | None = None

    def hold(self, value: float) -> bool:
        """Whether `value` lies within."""
        return (
            (self.gte is None or value >= self.gte)
            and (self.gt is None or value > self.gt)
            and (self.lte is None or value <= self.lte)
            and (self.lt is None or value < self.lt)
        )


@dataclass(frozen=True, slots=True)
class HasTag:
    """One of the memory's tags is among `values`."""

    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HasTier:
    """The memory's tier is among `values`."""

    values: tuple[Tier, ...]


@dataclass(frozen=True, slots=True)
class SourceIs:
    """A field of the source is among `values`."""

    field: SourceField
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TimeIn:
    """A time lies in a range of seconds since 1970."""

    field: TimeField
    bounds: Bounds


@dataclass(frozen=True, slots=True)
class MetadataIs:
    """One of the scalars at a dotted path is among `values`."""

    path: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class MetadataIn:
    """One of the numbers at a dotted path lies in a range; numbers compare as doubles."""

    path: str
    bounds: Bounds


@dataclass(frozen=True, slots=True)
class AllOf:
    """Every part matches."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """At least one part matches."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """The part does not match."""

    part: Filter


Filter: TypeAlias = (
    HasTag | HasTier | SourceIs | TimeIn | MetadataIs | MetadataIn | AllOf | AnyOf | Not
)


def matches(condition: Filter, fields: FilterFields) -> bool:  # noqa: PLR0911 one per type
    """Whether a memory with `fields` passes: the meaning that every index is held to."""
    match condition:
        case AllOf(parts):
            return all(matches(part, fields) for part in parts)
        case AnyOf(parts):
            return any(matches(part, fields) for part in parts)
        case Not(part):
            return not matches(part, fields)
        case HasTag(values):
            return not set(values).isdisjoint(fields.tags)
        case HasTier(values):
            return fields.tier in values
        case SourceIs(name, values):
            return fields.source.get(name) in values
        case TimeIn(name, bounds):
            return bounds.hold(fields.created_at if name == "created_at" else fields.updated_at)
        case MetadataIs(path, values):
            wanted = {_typed(value) for value in values}
            return any(_typed(value) in wanted for value in fields.metadata.get(path, ()))
        case MetadataIn(path, bounds):
            return any(bounds.hold(number) for number in numbers(fields.metadata.get(path, ())))


def numbers(values: Iterable[Scalar]) -> Iterator[float]:
    """The numbers among scalars, as doubles; true and false are none."""
    return (float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool))


def _typed(value: Scalar) -> tuple[bool, Scalar]:
    # In Python True == 1 and hashes alike; in JSON they differ.
    return isinstance(value, bool), value


def parse_filter(value: object, *, param: str = "filter") -> Filter:
    """The filter that a request's JSON says.

    Raises:
        InvalidRequest: anything else than the language above; `param` is the dotted path to it.
    """
    return _Parser().filter(value, param, depth=1)


def _wrong(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{param} {message}", param=param)


class _Parser:
    """Counts leaves while it descends, so that a small body cannot ask for endless work."""

    def __init__(self) -> None:
        self._leaves = 0

    def filter(self, value: object, param: str, *, depth: int) -> Filter:
        if depth > MAX_DEPTH:
            raise _wrong(param, f"is nested deeper than {MAX_DEPTH} levels; flatten it")
        parts: list[Filter] = []
        for key, item in _object(value, param, "one or more of " + ", ".join(_KEYS)).items():
            parts.extend(self._condition(key, item, param, depth))
        return parts[0] if len(parts) == 1 else AllOf(tuple(parts))

    def _condition(self, key: str, item: object, param: str, depth: int) -> Iterator[Filter]:
        here = f"{param}.{key}"
        match key:
            case "and":
                yield AllOf(self._parts(item, here, depth))
            case "or":
                yield AnyOf(self._parts(item, here, depth))
            case "not":
                yield Not(self.filter(item, here, depth=depth + 1))
            case "tags":
                yield self._leaf(HasTag(_strings(item, here)), here)
            case "tier":
                yield self._leaf(HasTier(_tiers(item, here)), here)
            case "created_at" | "updated_at":
                yield self._leaf(TimeIn(key, _bounds(item, here, _time)), here)
            case "source":
                yield from self._source(item, here)
            case "metadata":
                yield from self._metadata(item, here)
            case _:
                raise _unknown(key, param, _KEYS)

    def _leaf(self, leaf: Filter, param: str) -> Filter:
        self._leaves += 1
        if self._leaves > MAX_LEAVES:
            raise _wrong(param, f"is condition number {self._leaves} and the limit is {MAX_LEAVES}")
        return leaf

    def _parts(self, value: object, param: str, depth: int) -> tuple[Filter, ...]:
        if not isinstance(value, list | tuple) or not value:
            raise _wrong(param, "must be a list of one or more filters")
        return tuple(
            self.filter(item, f"{param}[{index}]", depth=depth + 1)
            for index, item in enumerate(value)
        )

    def _source(self, value: object, param: str) -> Iterator[Filter]:
        for name, item in _object(
            value, param, "one or more of " + ", ".join(SOURCE_FIELDS)
        ).items():
            here = f"{param}.{name}"
            for known in SOURCE_FIELDS:
                if name == known:
                    yield self._leaf(SourceIs(known, _strings(item, here)), here)
                    break
            else:
                raise _unknown(name, param, SOURCE_FIELDS)

    def _metadata(self, value: object, param: str) -> Iterator[Filter]:
        for path, item in _object(value, param, "dotted paths such as 'project.name'").items():
            _string(path, f"{param} key")
            here = f"{param}.{path}"
            if isinstance(item, Mapping):
                yield self._leaf(MetadataIn(path, _bounds(item, here, _number)), here)
            else:
                yield self._leaf(MetadataIs(path, _any_of(item, here, _scalar)), here)


def _unknown(key: str, param: str, known: Sequence[str]) -> InvalidRequest:
    name = key if len(key) <= 64 else key[:64] + "…"
    return InvalidRequest(
        f"{param} has no key {name!r}; known are {', '.join(known)}", param=f"{param}.{name}"
    )


def _object(value: object, param: str, what: str) -> dict[str, object]:
    if not isinstance(value, Mapping) or not value:
        raise _wrong(param, f"must be an object with {what}")
    for key in value:
        if not isinstance(key, str):
            raise _wrong(param, "holds a key that is no string")
    return dict(value)


def _any_of(value: object, param: str, read: Callable[[object, str], Scalar]) -> tuple[Scalar, ...]:
    if not isinstance(value, list | tuple):
        return (read(value, param),)
    if not 1 <= len(value) <= MAX_VALUES:
        raise _wrong(param, f"has {len(value)} values; give 1 to {MAX_VALUES}")
    return tuple(read(item, f"{param}[{index}]") for index, item in enumerate(value))


def _strings(value: object, param: str) -> tuple[str, ...]:
    return tuple(str(item) for item in _any_of(value, param, _string))


def _string(value: object, param: str) -> str:
    if not isinstance(value, str):
        raise _wrong(param, "must be a string or a list of strings")
    if len(value) > MAX_STRING_CHARS:
        raise _wrong(param, f"has {len(value)} characters and the limit is {MAX_STRING_CHARS}")
    check_encodable(value, param=param)
    return value


def _tiers(value: object, param: str) -> tuple[Tier, ...]:
    names = _strings(value, param)
    if unknown := [name for name in names if name not in set(Tier)]:
        raise _wrong(param, f"may be {', '.join(Tier)}; {unknown[0][:64]!r} is none of them")
    return tuple(Tier(name) for name in names)


def _scalar(value: object, param: str) -> Scalar:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _string(value, param)
    if isinstance(value, int | float):
        _number(value, param)
        return value
    raise _wrong(
        param, "must be a string, a number, true or false, a list of these, or an object with gte…"
    )


def _number(value: object, param: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(param, "must be a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(param, "must be a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise _wrong(param, "holds an integer of more than 64 bits")
    return float(value)


def _time(value: object, param: str) -> float:
    example = "must be a time with its zone, such as '2025-01-31T12:00:00Z'"
    if not isinstance(value, str) or _RFC3339.fullmatch(value) is None:
        raise _wrong(param, example)
    try:
        return datetime.fromisoformat(value.upper()).astimezone(UTC).timestamp()
    except (ValueError, OverflowError):
        raise _wrong(param, example) from None


def _bounds(value: object, param: str, read: Callable[[object, str], float]) -> Bounds:
    ends: dict[str, float] = {}
    for key, item in _object(value, param, "one or more of " + ", ".join(_BOUNDS)).items():
        if key not in _BOUNDS:
            raise _unknown(key, param, _BOUNDS)
        ends[key] = read(item, f"{param}.{key}")
    return Bounds(**ends)
