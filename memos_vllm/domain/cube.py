"""A MemCube: a portable cartridge of memory, and what a chat needs to know of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from memos_vllm.domain.artifact import ActivationState
from memos_vllm.domain.checks import check_document, check_line, check_words
from memos_vllm.domain.ids import CubeId, MemoryId, PrincipalId
from memos_vllm.domain.memory import MemoryState, Tier
from memos_vllm.domain.patch import UNSET, Unset
from memos_vllm.errors import InvalidRequest

MAX_CUBES_PER_CHAT = 8
MAX_NAME_CHARS = 200

CUBE_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class MemoryCounts:
    """Memories by state."""

    active: int = 0
    merged: int = 0
    archived: int = 0


@dataclass(frozen=True, slots=True)
class TierCounts:
    """Active memories by tier."""

    plaintext: int = 0
    activation: int = 0
    parametric: int = 0


@dataclass(frozen=True, slots=True)
class Activation:
    """A cube's activation memory.

    Args:
        tokens: tokens of the newest artifact of the current composition, 0 without one.
        bytes: bytes of all artifacts of the current composition.
        resident_tokens: filled in by the API from the engine's report; 0 in the catalog.
    """

    state: ActivationState = ActivationState.NONE
    tokens: int = 0
    bytes: int = 0
    resident_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Cube:
    """A cube as its readers see it; `version` moves with every change of it or its memories."""

    id: CubeId
    name: str
    description: str
    preamble: str
    labels: tuple[str, ...]
    owner: PrincipalId
    version: int
    epoch: int
    created_at: datetime
    updated_at: datetime
    memories: MemoryCounts = MemoryCounts()
    tiers: TierCounts = TierCounts()
    activation: Activation = Activation()
    # Filled when parametric memory arrives.
    adapter: None = None


@dataclass(frozen=True, slots=True)
class CubePatch:
    """A change of a cube; fields left `UNSET` stay."""

    name: str | Unset = UNSET
    description: str | Unset = UNSET
    preamble: str | Unset = UNSET
    labels: tuple[str, ...] | Unset = UNSET


@dataclass(frozen=True, slots=True)
class TierStats:
    """Active memories of one tier; tokens are known only where an artifact counted them."""

    memories: int = 0
    text_bytes: int = 0
    tokens: int = 0
    artifact_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CubeStats:
    """Counts and savings of a cube.

    Args:
        hits: chats that used the cube.
        hits_by_source: the same by where activation memory came from.
        prefill_tokens_saved: tokens taken from activation memory instead of a prefill.
    """

    cube_id: CubeId
    version: int
    memories: MemoryCounts
    tiers: Mapping[Tier, TierStats]
    artifacts: int
    hits: int = 0
    hits_by_source: Mapping[str, int] = field(default_factory=dict)
    prefill_tokens_saved: int = 0
    prefill_seconds_saved: float = 0.0
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class SnapshotMemory:
    """A memory of the activation tier as a chat needs it."""

    id: MemoryId
    version: int
    text: str
    title: str | None = None
    source_uri: str | None = None


@dataclass(frozen=True, slots=True)
class CubeSnapshot:
    """What a chat needs of a cube: its activation memory in prefix order, at one version.

    `has_plaintext` says whether there is anything to search for beside it.
    """

    id: CubeId
    name: str
    version: int
    epoch: int
    preamble: str
    memories: tuple[SnapshotMemory, ...] = ()
    has_plaintext: bool = False


@dataclass(frozen=True, slots=True)
class HeldSnapshot:
    """A snapshot that is kept for a while, with the times at which its memories expire."""

    snapshot: CubeSnapshot
    expiries: tuple[datetime | None, ...]

    def at(self, now: datetime) -> CubeSnapshot:
        """The snapshot without what has expired by `now`."""
        if all(expiry is None or expiry > now for expiry in self.expiries):
            return self.snapshot
        left = tuple(
            memory
            for memory, expiry in zip(self.snapshot.memories, self.expiries, strict=True)
            if expiry is None or expiry > now
        )
        return replace(self.snapshot, memories=left)


def validate_cube_id(value: str, *, param: str = "id") -> CubeId:
    """`value` as a cube id; raises InvalidRequest."""
    if not isinstance(value, str) or CUBE_ID.fullmatch(value) is None:
        raise InvalidRequest(
            f"{param} must be 1 to 64 of a-z, 0-9, '.', '_' and '-', and start with a letter or "
            "a digit",
            param=param,
        )
    return CubeId(value)


def checked_cube_patch(patch: CubePatch) -> CubePatch:
    """`patch` in normal form.

    Raises:
        InvalidRequest: a field is no line, holds NUL, or has too many labels.
        TooLarge: description or preamble over 64 KiB.
    """
    return CubePatch(
        name=(
            patch.name
            if patch.name is UNSET
            else check_line(patch.name, param="name", max_chars=MAX_NAME_CHARS)
        ),
        description=(
            patch.description
            if patch.description is UNSET
            else check_document(patch.description, param="description", blank=True)
        ),
        preamble=(
            patch.preamble
            if patch.preamble is UNSET
            else check_document(patch.preamble, param="preamble", blank=True)
        ),
        labels=patch.labels if patch.labels is UNSET else check_words(patch.labels, param="labels"),
    )


def count_states(counts: Mapping[MemoryState, int]) -> MemoryCounts:
    """Counts by state, zero where the mapping has none."""
    return MemoryCounts(
        active=counts.get(MemoryState.ACTIVE, 0),
        merged=counts.get(MemoryState.MERGED, 0),
        archived=counts.get(MemoryState.ARCHIVED, 0),
    )


def count_tiers(counts: Mapping[Tier, int]) -> TierCounts:
    """Counts by tier, zero where the mapping has none."""
    return TierCounts(
        plaintext=counts.get(Tier.PLAINTEXT, 0),
        activation=counts.get(Tier.ACTIVATION, 0),
        parametric=counts.get(Tier.PARAMETRIC, 0),
    )
