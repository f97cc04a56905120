"""What callers send. Types only: lengths and contents are the domain's rules.

Unknown fields are refused, so that a typing error is a clear 400 and never a silent default, and
JSON types are taken as they are: `1` is no string and `"1"` no number.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    model_validator,
)

from memos_vllm.domain.checks import check_encodable
from memos_vllm.domain.ids import MemoryId
from memos_vllm.domain.memory import (
    MAX_BATCH,
    Edge,
    MemoryPatch,
    MemoryState,
    NewMemory,
    Source,
    Tier,
)
from memos_vllm.domain.merge import MAX_PARENTS
from memos_vllm.domain.page import DEFAULT_LIMIT, MAX_LIMIT
from memos_vllm.domain.patch import UNSET

DEFAULT_WAIT_SECONDS = 300.0
MAX_WAIT_SECONDS = 600.0

_RFC_3339 = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d{1,9})?([Zz]|[+-]\d{2}:\d{2})")


def _rfc_3339(value: object) -> object:
    if isinstance(value, str) and _RFC_3339.fullmatch(value):
        try:
            return datetime.fromisoformat(value.upper())
        except ValueError as error:
            raise ValueError(f"no such time: {error}") from error
    if value is None or isinstance(value, datetime):
        return value
    raise ValueError("give a time as RFC 3339 with a time zone, such as 2030-01-31T12:00:00Z")


def _storable(value: str) -> str:
    check_encodable(value, param="it")
    return value


Time = Annotated[datetime, BeforeValidator(_rfc_3339)]
Words = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_storable)]
PathId = Annotated[str, Path(max_length=256), AfterValidator(_storable)]


class Input(BaseModel):
    """Base of everything that is read from a body."""

    model_config = ConfigDict(extra="forbid", strict=True)


class QueryInput(BaseModel):
    """Base of query parameters, which are all text and so are read leniently."""

    model_config = ConfigDict(extra="forbid")


class CubeInput(Input):
    """POST /v1/memcubes."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"id": "acme-support", "name": "Acme support", "preamble": "You know:"}]
        }
    )

    id: str | None = Field(default=None, description="Chosen by the server when it is left out.")
    name: str | None = None
    description: str | None = None
    preamble: str | None = Field(
        default=None, description="Text before the memories in every prompt."
    )
    labels: list[str] = []


class CubePatchInput(Input):
    """PATCH /v1/memcubes/{id}: fields that are left out stay."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"description": "Returns, refunds"}]})

    name: str = ""
    description: str = ""
    preamble: str = ""
    labels: list[str] = []

    def changes(self) -> dict[str, Any]:
        """The fields that were sent, in the domain's types."""
        given = self.model_dump(exclude_unset=True)
        if "labels" in given:
            given["labels"] = tuple(given["labels"])
        return given


class SourceInput(Input):
    """Where a memory came from."""

    kind: str = "note"
    uri: str | None = None
    title: str | None = None
    author: str | None = None
    created_at: Time | None = None
    locator: str | None = None

    def to_domain(self) -> Source:
        return Source(**self.model_dump())


class EdgeInput(Input):
    """A link to another memory of the same cube."""

    kind: str
    target: str
    weight: float = 1.0

    def to_domain(self) -> Edge:
        return Edge(kind=self.kind, target=MemoryId(self.target), weight=self.weight)


class MemoryInput(Input):
    """One memory to add."""

    text: str
    tags: list[str] = []
    source: SourceInput | None = None
    edges: list[EdgeInput] = []
    labels: list[str] = []
    metadata: dict[str, Any] = {}
    expires_at: Time | None = None

    def to_domain(self) -> NewMemory:
        return NewMemory(
            text=self.text,
            tags=tuple(self.tags),
            source=None if self.source is None else self.source.to_domain(),
            edges=tuple(edge.to_domain() for edge in self.edges),
            labels=tuple(self.labels),
            metadata=self.metadata,
            expires_at=self.expires_at,
        )


class MemoriesInput(Input):
    """POST /v1/memcubes/{id}/memories: all are added, or none."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "memories": [
                        {"text": "Refunds take five working days.", "tags": ["refunds"]},
                        {"text": "The returns desk is in Leeds.", "source": {"kind": "handbook"}},
                    ]
                }
            ]
        }
    )

    memories: list[MemoryInput] = Field(description=f"At most {MAX_BATCH}, 64 KiB of text each.")
    reason: str | None = Field(default=None, description="Why, for the history.")


class MergeInput(Input):
    """POST /v1/memcubes/{id}/merge."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "memory_ids": [
                        "mem_01k9z3v7q0c4m8x2h5r6t1w9n",
                        "mem_01k9z3v7q0c4m8x2h5r6t1w9m",
                    ],
                    "text": "Refunds take five working days, and the returns desk is in Leeds.",
                }
            ]
        }
    )

    memory_ids: list[str] = Field(description=f"2 to {MAX_PARENTS} active memories.")
    text: str | None = Field(
        default=None, description="What the new one says; the parents' texts when absent."
    )
    reason: str | None = Field(default=None, description="Why, for the history.")


class MemoryPatchInput(Input):
    """PATCH of a memory: fields that are left out stay."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"text": "Refunds take three working days.", "reason": "new policy"}]
        }
    )

    text: str = ""
    tags: list[str] = []
    source: SourceInput = SourceInput()
    edges: list[EdgeInput] = []
    labels: list[str] = []
    metadata: dict[str, Any] = {}
    expires_at: Time | None = None
    reason: str | None = None

    def to_domain(self) -> MemoryPatch:
        given = self.model_fields_set
        return MemoryPatch(
            text=self.text if "text" in given else UNSET,
            tags=tuple(self.tags) if "tags" in given else UNSET,
            source=self.source.to_domain() if "source" in given else UNSET,
            edges=tuple(edge.to_domain() for edge in self.edges) if "edges" in given else UNSET,
            labels=tuple(self.labels) if "labels" in given else UNSET,
            metadata=self.metadata if "metadata" in given else UNSET,
            expires_at=self.expires_at if "expires_at" in given else UNSET,
            reason=self.reason,
        )


# "plaintext" is let through: the domain says what to do instead.
TierName = Literal["activation", "parametric", "plaintext"]


class _MoveInput(Input):
    """Which memories, and whether to wait for the job."""

    memory_ids: list[str] | Literal["all"] | None = Field(
        default=None, description='Ids, or "all" for every active memory without a label.'
    )
    all: StrictBool = Field(default=False, description='The same as "memory_ids": "all".')
    wait: StrictBool | Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)] = Field(
        default=False,
        description=(
            f"Seconds to wait for the job; true waits up to {DEFAULT_WAIT_SECONDS:.0f}. "
            "The answer is 202 when it has not finished by then."
        ),
    )

    @model_validator(mode="after")
    def _names_memories_once(self) -> _MoveInput:
        if self.all == (self.memory_ids is not None):
            raise ValueError('give "memory_ids" as a list of ids or "all", and only once')
        if self.memory_ids == []:
            raise ValueError('"memory_ids" is empty; give at least one id, or "all"')
        return self

    @property
    def selected(self) -> list[str] | None:
        """The ids, or None for all."""
        return self.memory_ids if isinstance(self.memory_ids, list) else None

    @property
    def wait_seconds(self) -> float:
        if isinstance(self.wait, bool):
            return DEFAULT_WAIT_SECONDS if self.wait else 0.0
        return float(self.wait)


class PromoteInput(_MoveInput):
    """POST /v1/memcubes/{id}/promote."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"to": "activation", "memory_ids": "all", "wait": True}],
        }
    )

    to: TierName

    @property
    def tier(self) -> Tier:
        return Tier(self.to)


class DemoteInput(_MoveInput):
    """POST /v1/memcubes/{id}/demote."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"from": "activation", "memory_ids": ["mem_01"]}]}
    )

    from_: TierName = Field(alias="from")

    @property
    def tier(self) -> Tier:
        return Tier(self.from_)


class PageQuery(QueryInput):
    """Which page of a list."""

    limit: int = Field(default=DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: Words | None = Field(default=None, description="`next_cursor` of the page before.")


class WaitQuery(QueryInput):
    """How long a request waits for its job."""

    wait: float = Field(
        default=0.0, ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait for the job's end."
    )


class MemoriesQuery(PageQuery):
    """Which memories of a cube."""

    state: MemoryState | None = None
    tier: Tier | None = None
    tag: Words | None = None
    q: Words | None = Field(default=None, description="Words that the text must hold.")


class EraseQuery(QueryInput):
    """DELETE of a memory."""

    erase: bool = Field(
        default=False, description="Remove the text for good instead of archiving it."
    )
