"""Memory for LLM serving: MemCubes whose KV is already in attention.

Importing this package imports neither torch, vllm nor ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memos_vllm.errors import ApiError, MemosError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memos_vllm.client import MOS, AsyncMOS

__all__ = ["MOS", "ApiError", "AsyncMOS", "MemosError", "__version__"]


def __getattr__(name: str) -> Any:
    # httpx takes 60 ms to import; only those who ask for a client pay for it.
    if name in {"MOS", "AsyncMOS"}:
        from memos_vllm import client

        return getattr(client, name)
    raise AttributeError(f"module 'memos_vllm' has no attribute {name!r}")
