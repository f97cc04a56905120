"""What one chat took from a cube."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from memos_vllm.domain.ids import CubeId, MemoryId


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """One chat's use of one cube.

    Args:
        tokens: tokens of the cube's memory in the prompt.
        cached_tokens: of these, the ones that no prefill had to compute.
        source: what the connector did: resident, store, computed or none.
        saved_seconds: prefill time saved, where the engine can tell.
    """

    cube_id: CubeId
    memory_ids: tuple[MemoryId, ...]
    tokens: int
    cached_tokens: int
    source: str
    at: datetime
    saved_seconds: float = 0.0
