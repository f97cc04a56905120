"""The Python client; see `MOS`. Needs httpx only: no torch, no vllm."""

from __future__ import annotations

from memos_vllm.client.cartridge import CubeArrival, MemoryDifference
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
from memos_vllm.client.keys import KeyInfo, NewKey, PrincipalInfo
from memos_vllm.client.mos import MOS, AsyncMOS
from memos_vllm.client.objects import (
    CubeInfo,
    ErasedInfo,
    GrantInfo,
    Health,
    JobInfo,
    MemoryInfo,
)
from memos_vllm.client.replies import ChatMemos, ChatReply, Remembered, RetrievedMemory
from memos_vllm.client.session import RetryPolicy
from memos_vllm.client.sessions import AsyncCubeSession, CubeSession, worth_keeping
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
    "AsyncCubeSession",
    "AsyncMOS",
    "ChatMemos",
    "ChatReply",
    "ChatStream",
    "Cube",
    "CubeArrival",
    "CubeInfo",
    "CubeSession",
    "DocumentInfo",
    "ErasedInfo",
    "GrantInfo",
    "Health",
    "Hop",
    "JobFailed",
    "JobInfo",
    "JobTimeout",
    "KeyInfo",
    "MemoryDifference",
    "MemoryInfo",
    "MemosError",
    "NewKey",
    "PendingChanges",
    "PrincipalInfo",
    "Remembered",
    "ReplyTimeout",
    "RetrievedMemory",
    "RetryPolicy",
    "SearchHit",
    "SearchResult",
    "ServerUnreachable",
    "UnexpectedReply",
    "worth_keeping",
]
