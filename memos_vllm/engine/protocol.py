"""The chat request, as vLLM takes it and with the fields of memory."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from memos_vllm.api.replies import ErrorDetail


class ChatErrorDetail(ErrorDetail):
    """vLLM's codes are numbers."""

    code: str | int | None  # type: ignore[assignment]


class ChatErrorReply(BaseModel):
    """An error of ours or of vLLM's, in OpenAI's shape."""

    error: ChatErrorDetail


class MemoryChatRequest(ChatCompletionRequest):
    """vLLM's chat request plus memory. Checked in `engine.chat`, for errors that name limits."""

    memcube_id: Any = Field(
        default=None,
        description="A cube id, or a list of up to 8.",
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 8},
                {"type": "null"},
            ],
            "examples": ["acme-support"],
        },
    )
    mem_cube_id: Any = Field(default=None, description="Alias of memcube_id.")
    memos: Any = Field(
        default=None,
        description="How memory is used: session_id, retrieve, activation, adapter, remember.",
        json_schema_extra={"examples": [{"activation": True, "session_id": "call-17"}]},
    )

    @property
    def names_memory(self) -> bool:
        """Whether the request asks for memory in any way, rightly or wrongly."""
        given = (self.memcube_id, self.mem_cube_id, self.memos)
        return any(value is not None for value in given)
