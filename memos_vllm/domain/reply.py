"""The answer kept for an Idempotency-Key."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredReply:
    """HTTP status and body exactly as first sent."""

    status: int
    body: bytes
