"""A memory: one unit of knowledge. Its text is the ground truth, always."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from memos_vllm.domain.checks import (
    JsonObject,
    check_document,
    check_json_object,
    check_line,
    check_time,
    check_words,
)
from memos_vllm.domain.ids import CubeId, MemoryId, PrincipalId
from memos_vllm.domain.patch import UNSET, Unset
from memos_vllm.errors import InvalidRequest, TooLarge

MAX_BATCH = 1000
MAX_EDGES = 256
MAX_REASON_CHARS = 1000

EDGE_KIND = re.compile(r"[a-z][a-z0-9._-]{0,63}")


class MemoryState(StrEnum):
    """Where a memory is in its life; an erased memory has no row and so no state."""

    ACTIVE = "active"
    MERGED = "merged"
    ARCHIVED = "archived"


class Tier(StrEnum):
    """How a memory reaches the model: found by search, as KV blocks, or as an adapter."""

    PLAINTEXT = "plaintext"
    ACTIVATION = "activation"
    PARAMETRIC = "parametric"


class MemoryChange(StrEnum):
    """What made a version of a memory."""

    ADDED = "added"
    EDITED = "edited"
    ARCHIVED = "archived"
    RESTORED = "restored"
    MERGED = "merged"


class Relation(StrEnum):
    """How a memory stems from another."""

    DERIVED_FROM = "derived_from"
    MERGED_INTO = "merged_into"
    SUPERSEDES = "supersedes"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a memory came from; `locator` is a place inside `uri` (page, heading, turn)."""

    kind: str = "note"
    uri: str | None = None
    title: str | None = None
    author: str | None = None
    created_at: datetime | None = None
    locator: str | None = None


@dataclass(frozen=True, slots=True)
class Lineage:
    """Parents, the memory that took this one's place, and the ones whose place it took."""

    derived_from: tuple[MemoryId, ...] = ()
    merged_into: MemoryId | None = None
    supersedes: tuple[MemoryId, ...] = ()


@dataclass(frozen=True, slots=True)
class Edge:
    """A typed, directed link to another memory of the same cube."""

    kind: str
    target: MemoryId
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Usage:
    """How often a memory reached a model, and when it last did."""

    hits: int = 0
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class NewMemory:
    """What a caller gives to add a memory; `checked_memory` validates it."""

    text: str
    tags: tuple[str, ...] = ()
    source: Source | None = None
    edges: tuple[Edge, ...] = ()
    labels: tuple[str, ...] = ()
    metadata: JsonObject = field(default_factory=dict)
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class MemoryPatch:
    """A change of a memory; fields left `UNSET` stay, `expires_at=None` removes the expiry."""

    text: str | Unset = UNSET
    tags: tuple[str, ...] | Unset = UNSET
    source: Source | Unset = UNSET
    edges: tuple[Edge, ...] | Unset = UNSET
    labels: tuple[str, ...] | Unset = UNSET
    metadata: JsonObject | Unset = UNSET
    expires_at: datetime | Unset | None = UNSET
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """A stored memory. `position` orders the activation tier (1 is first) and is 0 elsewhere."""

    id: MemoryId
    cube_id: CubeId
    text: str
    tags: tuple[str, ...]
    labels: tuple[str, ...]
    metadata: JsonObject
    source: Source
    state: MemoryState
    tier: Tier
    version: int
    lineage: Lineage
    edges: tuple[Edge, ...]
    created_by: PrincipalId
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None
    usage: Usage
    position: int = 0


@dataclass(frozen=True, slots=True)
class MemoryVersion:
    """One line of a memory's history: what it said, who made it so, when, why and from what.

    Args:
        lineage: what this change made it stem from, or go into; what was erased since is left out.
    """

    memory_id: MemoryId
    version: int
    text: str
    tags: tuple[str, ...]
    labels: tuple[str, ...]
    metadata: JsonObject
    source: Source
    state: MemoryState
    expires_at: datetime | None
    change: MemoryChange
    reason: str | None
    changed_by: PrincipalId
    changed_at: datetime
    lineage: Lineage = Lineage()

    @property
    def id(self) -> MemoryId:
        """The memory's."""
        return self.memory_id


def validate_text(text: str, *, param: str = "text") -> str:
    """`text` itself when it can be a memory.

    Raises:
        InvalidRequest: blank, or with NUL or a lone surrogate.
        TooLarge: over 64 KiB of UTF-8.
    """
    return check_document(text, param=param)


def validate_reason(reason: str | None, *, param: str = "reason") -> str | None:
    """`reason` itself when it is None or one line; raises InvalidRequest."""
    if reason is None:
        return None
    return check_line(reason, param=param, max_chars=MAX_REASON_CHARS)


def _kind(value: str, *, param: str) -> str:
    if EDGE_KIND.fullmatch(value) is None:
        raise InvalidRequest(
            f"{param} must be a lower-case word of at most 64 of a-z, 0-9, '.', '_' and '-'",
            param=param,
        )
    return value


def validate_source(source: Source, *, param: str = "source") -> Source:
    """`source` with its time in UTC; raises InvalidRequest."""
    _kind(source.kind, param=f"{param}.kind")
    for name, value, max_chars in (
        ("uri", source.uri, 2048),
        ("title", source.title, 512),
        ("author", source.author, 256),
        ("locator", source.locator, 512),
    ):
        if value is not None:
            check_line(value, param=f"{param}.{name}", max_chars=max_chars)
    created_at = check_time(source.created_at, param=f"{param}.created_at")
    return replace(source, created_at=created_at)


def validate_edges(edges: Sequence[Edge], *, param: str = "edges") -> tuple[Edge, ...]:
    """`edges` as a tuple; that the targets exist is checked by the catalog.

    Raises:
        InvalidRequest: too many, two of one kind to one target, or a weight outside 0..1.
    """
    if len(edges) > MAX_EDGES:
        raise InvalidRequest(
            f"{param} has {len(edges)} entries and the limit is {MAX_EDGES}", param=param
        )
    seen: set[tuple[str, str]] = set()
    for index, edge in enumerate(edges):
        here = f"{param}[{index}]"
        _kind(edge.kind, param=f"{here}.kind")
        check_line(edge.target, param=f"{here}.target", max_chars=128)
        if not (math.isfinite(edge.weight) and 0.0 <= edge.weight <= 1.0):
            raise InvalidRequest(f"{here}.weight must lie in 0..1", param=f"{here}.weight")
        if (edge.kind, edge.target) in seen:
            raise InvalidRequest(f"{here} repeats an edge of the same kind", param=here)
        seen.add((edge.kind, edge.target))
    return tuple(edges)


def checked_memory(memory: NewMemory, *, param: str = "memory") -> NewMemory:
    """`memory` in normal form: no double tags, times in UTC, a source.

    Raises:
        InvalidRequest, TooLarge: see the validators; the message names the field under `param`.
    """
    return NewMemory(
        text=validate_text(memory.text, param=f"{param}.text"),
        tags=check_words(memory.tags, param=f"{param}.tags"),
        source=validate_source(memory.source or Source(), param=f"{param}.source"),
        edges=validate_edges(memory.edges, param=f"{param}.edges"),
        labels=check_words(memory.labels, param=f"{param}.labels"),
        metadata=check_json_object(memory.metadata, param=f"{param}.metadata"),
        expires_at=check_time(memory.expires_at, param=f"{param}.expires_at"),
    )


def checked_batch(memories: Sequence[NewMemory]) -> list[NewMemory]:
    """Every memory of one call in normal form.

    Raises:
        InvalidRequest: none at all, or one of them is unusable.
        TooLarge: more than `MAX_BATCH`, or one of them is too large.
    """
    if not memories:
        raise InvalidRequest("memories is empty; give at least one", param="memories")
    if len(memories) > MAX_BATCH:
        raise TooLarge(
            f"{len(memories)} memories in one call and the limit is {MAX_BATCH}; send several calls"
        )
    return [
        checked_memory(memory, param=f"memories[{index}]") for index, memory in enumerate(memories)
    ]


def checked_patch(patch: MemoryPatch) -> MemoryPatch:
    """`patch` in normal form; raises what the validators raise."""
    return MemoryPatch(
        text=patch.text if patch.text is UNSET else validate_text(patch.text),
        tags=patch.tags if patch.tags is UNSET else check_words(patch.tags, param="tags"),
        source=patch.source if patch.source is UNSET else validate_source(patch.source),
        edges=patch.edges if patch.edges is UNSET else validate_edges(patch.edges),
        labels=patch.labels if patch.labels is UNSET else check_words(patch.labels, param="labels"),
        metadata=(
            patch.metadata
            if patch.metadata is UNSET
            else check_json_object(patch.metadata, param="metadata")
        ),
        expires_at=(
            patch.expires_at
            if patch.expires_at is UNSET
            else check_time(patch.expires_at, param="expires_at")
        ),
        reason=validate_reason(patch.reason),
    )
