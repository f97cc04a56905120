"""The files of an archive, how large they may be, and its manifest."""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from memos_vllm.errors import InvalidRequest

SCHEMA_VERSION = 1

MANIFEST = "manifest.json"
CHECKSUMS = "checksums.json"
MAX_JSON_BYTES = 1 << 20
# Of an artifact: token ids, at five bytes each.
MAX_DESCRIPTION_BYTES = 16 << 20
# A text of 64 KiB, every character of it escaped, and 16 KiB of metadata.
MAX_LINE_BYTES = 1 << 20
MAX_PART_BYTES = 8 << 30
MAX_PART_LINES = 10_000_000
MAX_MEMORIES = 1_000_000
# Kept in memory while it is searched for circles, at some 150 bytes a line.
MAX_LINEAGE = 1_000_000
MAX_ARTIFACTS = 64
MAX_SHARDS = 1024
MAX_ARTIFACT_BYTES = 256 << 30

_ARTIFACT_FILE = re.compile(
    r"artifacts/(0|[1-9]\d?)/(?:(manifest)\.json|shard-(0|[1-9]\d{0,3})\.safetensors)"
)


class Part(StrEnum):
    """The text of a cube, one kind of record a file; members stand in the archive's order."""

    MEMORIES = "memories"
    VERSIONS = "versions"
    EDGES = "edges"
    LINEAGE = "lineage"
    DOCUMENTS = "documents"
    CHUNKS = "chunks"
    SESSIONS = "sessions"
    VECTORS = "vectors"
    AUDIT = "audit"

    @property
    def file_name(self) -> str:
        return f"{self.value}.jsonl"

    @property
    def max_lines(self) -> int:
        """More than this is no cube but an attack, or wants to be several cubes."""
        return {Part.MEMORIES: MAX_MEMORIES, Part.LINEAGE: MAX_LINEAGE}.get(self, MAX_PART_LINES)


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CubeFacts(_Frozen):
    """What the archive says of the cube itself; `owner` and `version` are where it came from."""

    id: str
    name: str
    description: str
    preamble: str
    labels: tuple[str, ...]
    owner: str
    version: int
    created_at: AwareDatetime


class ArtifactFacts(_Frozen):
    """An artifact that is in the archive, so that a reader knows early whether it is of use."""

    fingerprint: str = Field(max_length=256)
    numerics: str = Field(max_length=1024)
    renderer_version: int
    tokens: int
    size_bytes: int


class Manifest(_Frozen):
    """The first file.

    Args:
        whole: whether the exporter saw every memory; otherwise what labels hid from it is missing.
        counts: lines of each part.
    """

    format: Literal["memcube"] = "memcube"
    schema_version: int = SCHEMA_VERSION
    created_at: datetime
    created_by: str = Field(max_length=128)
    include: tuple[str, ...] = Field(max_length=8)
    whole: bool
    cube: CubeFacts
    counts: dict[str, int]
    artifacts: tuple[ArtifactFacts, ...] = Field(default=(), max_length=MAX_ARTIFACTS)


class _Version(BaseModel):
    """The fields that every version of the format has, read before all others."""

    format: Literal["memcube"]
    schema_version: int = Field(ge=1)


def parse_manifest(data: bytes) -> Manifest:
    """Raises InvalidRequest: another format, a newer schema, or counts that make no sense."""
    try:
        version = _Version.model_validate_json(data).schema_version
        if version > SCHEMA_VERSION:
            raise InvalidRequest(
                f"the archive is of schema version {version} and this server understands versions "
                f"up to {SCHEMA_VERSION}; upgrade memos_vllm"
            )
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise invalid(MANIFEST, error) from None
    if manifest.counts.keys() != set(Part):
        raise InvalidRequest(f"{MANIFEST} does not count each part of the archive")
    for part in Part:
        if not 0 <= manifest.counts[part] <= part.max_lines:
            raise InvalidRequest(
                f"{MANIFEST} counts {manifest.counts[part]} {part.value}; at most {part.max_lines} "
                "can be in one cube"
            )
    return manifest


def invalid(place: str, error: ValidationError) -> InvalidRequest:
    """What pydantic found, without what it found it in: that may be a memory."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(step)[:64] for step in found["loc"])
    return InvalidRequest(f"{place}{': ' if field else ''}{field}: {found['msg']}"[:500])


def artifact_file(name: str) -> tuple[int, int | None] | None:
    """The numbers in a name: of the artifact, and of the shard or None for its manifest."""
    match = _ARTIFACT_FILE.fullmatch(name)
    if match is None:
        return None
    return int(match[1]), None if match[2] else int(match[3])


def artifact_name(artifact: int, shard: int | None) -> str:
    """The inverse of `artifact_file`."""
    file = "manifest.json" if shard is None else f"shard-{shard}.safetensors"
    return f"artifacts/{artifact}/{file}"
