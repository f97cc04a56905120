"""The Python client; see `MOS`. Needs httpx only: no torch, no vllm."""

from __future__ import annotations

from memos_vllm.client.cube import AsyncCube, Cube
from memos_vllm.client.documents import DocumentInfo
from memos_vllm.client.errors import (
    ApiBadRequest,
    ApiConflict,
    ApiNotFound,
    ApiRateLimited,
    ApiStaleVersion,
    ApiTooLarge,
    ApiUnauthorized,
    ApiUnavailable,
    JobFailed,
    JobTimeout,
    ReplyTimeout,
    ServerUnreachable,
    UnexpectedReply,
)
from memos_vllm.client.found import Hop, PendingChanges, SearchHit, SearchResult
from memos_vllm.client.mos import MOS, AsyncMOS
from memos_vllm.client.objects import CubeInfo, Health, JobInfo, MemoryInfo
from memos_vllm.client.replies import ChatMemos, ChatReply, Remembered, RetrievedMemory
from memos_vllm.client.session import RetryPolicy
from memos_vllm.client.stream import AsyncChatStream, ChatStream
from memos_vllm.domain.patch import UNSET
from memos_vllm.errors import ApiError, MemosError

__all__ = [
    "MOS",
    "UNSET",
    "ApiBadRequest",
    "ApiConflict",
    "ApiError",
    "ApiNotFound",
    "ApiRateLimited",
    "ApiStaleVersion",
    "ApiTooLarge",
    "ApiUnauthorized",
    "ApiUnavailable",
    "AsyncChatStream",
    "AsyncCube",
    "AsyncMOS",
    "ChatMemos",
    "ChatReply",
    "ChatStream",
    "Cube",
    "CubeInfo",
    "DocumentInfo",
    "Health",
    "Hop",
    "JobFailed",
    "JobInfo",
    "JobTimeout",
    "MemoryInfo",
    "MemosError",
    "PendingChanges",
    "Remembered",
    "ReplyTimeout",
    "RetrievedMemory",
    "RetryPolicy",
    "SearchHit",
    "SearchResult",
    "ServerUnreachable",
    "UnexpectedReply",
]
