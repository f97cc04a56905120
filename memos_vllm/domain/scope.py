"""What the index knows of a memory besides its vectors, and what of it a caller may see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from memos_vllm.domain.access import SYSTEM
from memos_vllm.domain.ids import CubeId, PrincipalId
from memos_vllm.domain.memory import Memory, Tier

Scalar: TypeAlias = str | int | float | bool
SourceField: TypeAlias = Literal["kind", "uri", "title", "author", "locator"]


@dataclass(frozen=True, slots=True)
class Scope:
    """What the caller may see at all; made by the system, never read from a request.

    Args:
        cube_ids: only memories of these cubes.
        labels: only memories whose labels are all among these; None allows every label.
        now: only memories that do not expire at or before this time, seconds since 1970.
        reader: who asks, for the audit of what is read.
    """

    cube_ids: tuple[CubeId, ...]
    labels: frozenset[str] | None
    now: float
    reader: PrincipalId = SYSTEM.id


@dataclass(frozen=True, slots=True)
class FilterFields:
    """What filters compare of one memory. Times are seconds since 1970.

    `metadata` maps dotted paths to the scalars found there (see `flat_metadata`).
    """

    created_at: float
    updated_at: float
    tier: Tier = Tier.PLAINTEXT
    tags: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    expires_at: float | None = None
    source: Mapping[SourceField, str] = field(default_factory=dict)
    metadata: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, memory: Memory) -> FilterFields:
        """The fields of a memory of the catalog."""
        source = memory.source
        created_at = source.created_at or memory.created_at
        values: dict[SourceField, str | None] = {
            "kind": source.kind,
            "uri": source.uri,
            "title": source.title,
            "author": source.author,
            "locator": source.locator,
        }
        return cls(
            created_at=created_at.timestamp(),
            updated_at=memory.updated_at.timestamp(),
            tier=memory.tier,
            tags=memory.tags,
            labels=memory.labels,
            expires_at=None if memory.expires_at is None else memory.expires_at.timestamp(),
            source={name: value for name, value in values.items() if value is not None},
            metadata=flat_metadata(memory.metadata),
        )


def flat_metadata(metadata: Mapping[str, object]) -> dict[str, tuple[Scalar, ...]]:
    """The scalars of nested metadata by dotted path; lists are any of their items, nulls nothing.

    `{"a": {"b": [1, "x"]}}` and `{"a.b": [1, "x"]}` both give `{"a.b": (1, "x")}`.
    """
    found: dict[str, list[Scalar]] = {}
    for path, value in _scalars(metadata, ""):
        found.setdefault(path, []).append(value)
    return {path: tuple(values) for path, values in found.items()}


def _scalars(value: object, path: str) -> Iterator[tuple[str, Scalar]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _scalars(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _scalars(item, path)
    elif isinstance(value, str | int | float):
        yield path, value


def allows(scope: Scope, cube_id: CubeId, fields: FilterFields) -> bool:
    """Whether a memory of `cube_id` lies within `scope`."""
    return (
        cube_id in scope.cube_ids
        and (scope.labels is None or scope.labels.issuperset(fields.labels))
        and (fields.expires_at is None or fields.expires_at > scope.now)
    )
