"""What callers send. Types only: lengths and contents are the domain's rules.

Unknown fields are refused, so that a typing error is a clear 400 and never a silent default, and
JSON types are taken as they are: `1` is no string and `"1"` no number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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

from memos_vllm.api import limits
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
from memos_vllm.errors import InvalidRequest

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
    try:
        check_encodable(value, param="it")
    except InvalidRequest as error:
        # pydantic knows the parameter's name.
        raise ValueError(str(error)) from error
    return value


Time = Annotated[datetime, BeforeValidator(_rfc_3339)]
Phrase = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_storable)]
Words = Annotated[list[str], Field(json_schema_extra=limits.WORDS)]
Reason = Annotated[
    str | None, Field(description="Why, for the history.", json_schema_extra=limits.REASON)
]
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

    id: str | None = Field(
        default=None,
        description="Chosen by the server when it is left out.",
        json_schema_extra=limits.CUBE_ID,
    )
    name: str | None = Field(default=None, json_schema_extra=limits.NAME)
    description: str | None = Field(default=None, json_schema_extra=limits.LONG_TEXT)
    preamble: str | None = Field(
        default=None,
        description="Text before the memories in every prompt.",
        json_schema_extra=limits.LONG_TEXT,
    )
    labels: Words = []


def _patch_example(example: dict[str, Any]) -> Callable[[limits.Schema], None]:
    """The schema of a body whose fields stay as they are when they are left out."""

    def tell(schema: limits.Schema) -> None:
        for field in schema["properties"].values():
            field.pop("default", None)
        schema["examples"] = [example]

    return tell


class CubePatchInput(Input):
    """PATCH /v1/memcubes/{id}: fields that are left out stay."""

    model_config = ConfigDict(json_schema_extra=_patch_example({"description": "Returns, refunds"}))

    name: str = Field(default="", json_schema_extra=limits.NAME)
    description: str = Field(default="", json_schema_extra=limits.LONG_TEXT)
    preamble: str = Field(default="", json_schema_extra=limits.LONG_TEXT)
    labels: Words = []

    def changes(self) -> dict[str, Any]:
        """The fields that were sent, in the domain's types."""
        given = self.model_dump(exclude_unset=True)
        if "labels" in given:
            given["labels"] = tuple(given["labels"])
        return given


class SourceInput(Input):
    """Where a memory came from."""

    kind: str = Field(default="note", json_schema_extra=limits.KIND)
    uri: str | None = Field(default=None, json_schema_extra=limits.line(2048))
    title: str | None = Field(default=None, json_schema_extra=limits.line(512))
    author: str | None = Field(default=None, json_schema_extra=limits.line(256))
    created_at: Time | None = None
    locator: str | None = Field(default=None, json_schema_extra=limits.line(512))

    def to_domain(self) -> Source:
        return Source(**self.model_dump())


class EdgeInput(Input):
    """A link to another memory of the same cube."""

    kind: str = Field(json_schema_extra=limits.KIND)
    target: str = Field(json_schema_extra=limits.line(128))
    weight: float = Field(default=1.0, json_schema_extra=limits.WEIGHT)

    def to_domain(self) -> Edge:
        return Edge(kind=self.kind, target=MemoryId(self.target), weight=self.weight)


Edges = Annotated[list[EdgeInput], Field(json_schema_extra=limits.EDGES)]


class MemoryInput(Input):
    """One memory to add."""

    text: str = Field(json_schema_extra=limits.TEXT)
    tags: Words = []
    source: SourceInput | None = None
    edges: Edges = []
    labels: Words = []
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

    memories: list[MemoryInput] = Field(
        description=f"At most {MAX_BATCH}, 64 KiB of text each.", json_schema_extra=limits.BATCH
    )
    reason: Reason = None


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

    memory_ids: list[str] = Field(
        description=f"2 to {MAX_PARENTS} active memories.", json_schema_extra=limits.PARENTS
    )
    text: str | None = Field(
        default=None,
        description="What the new one says; the parents' texts when absent.",
        json_schema_extra=limits.TEXT,
    )
    reason: Reason = None


class MemoryPatchInput(Input):
    """PATCH of a memory: fields that are left out stay."""

    model_config = ConfigDict(
        json_schema_extra=_patch_example(
            {"text": "Refunds take three working days.", "reason": "new policy"}
        )
    )

    text: str = Field(default="", json_schema_extra=limits.TEXT)
    tags: Words = []
    source: SourceInput = SourceInput()
    edges: Edges = []
    labels: Words = []
    metadata: dict[str, Any] = {}
    expires_at: Time | None = None
    reason: Reason = None

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


class KeepInput(Input):
    """POST /v1/memcubes/{id}/keep."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"from": "session.4f1d", "memory_ids": "all"}]}
    )

    from_: str = Field(alias="from", description="The cube whose memories are kept.")
    memory_ids: list[str] | Literal["all"] = Field(
        description='Active memories there, or "all" that you may see; at most 1,000.'
    )
    reason: Reason = None

    @property
    def selected(self) -> list[str] | None:
        """The ids, or None for all."""
        return self.memory_ids if isinstance(self.memory_ids, list) else None


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
            **limits.MEMORIES_ONCE,
        }
    )

    to: TierName

    @property
    def tier(self) -> Tier:
        return Tier(self.to)


class DemoteInput(_MoveInput):
    """POST /v1/memcubes/{id}/demote."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"from": "activation", "memory_ids": ["mem_01"]}],
            **limits.MEMORIES_ONCE,
        }
    )

    from_: TierName = Field(alias="from")

    @property
    def tier(self) -> Tier:
        return Tier(self.from_)


class PageQuery(QueryInput):
    """Which page of a list."""

    limit: int = Field(default=DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: Phrase | None = Field(default=None, description="`next_cursor` of the page before.")


class WaitQuery(QueryInput):
    """How long a request waits for its job."""

    wait: float = Field(
        default=0.0, ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait for the job's end."
    )


class MemoriesQuery(PageQuery):
    """Which memories of a cube."""

    state: MemoryState | None = None
    tier: Tier | None = None
    tag: Phrase | None = None
    q: Phrase | None = Field(default=None, description="Words that the text must hold.")


class EraseQuery(QueryInput):
    """DELETE of a memory."""

    erase: bool = Field(
        default=False, description="Remove the text for good instead of archiving it."
    )
