"""The route of chat turns."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from pydantic import ConfigDict, Field

from memos_vllm.api import examples, limits
from memos_vllm.api.conditions import TAKES_KEY, answer_once
from memos_vllm.api.context import CurrentCall
from memos_vllm.api.replies import ListReply, MemoryReply, render
from memos_vllm.api.route import MemosRoute
from memos_vllm.api.schemas import Input, PathId, Reason, Time
from memos_vllm.domain.memory import MAX_BATCH
from memos_vllm.domain.turn import NewTurn
from memos_vllm.errors import InvalidRequest

router = APIRouter(route_class=MemosRoute, tags=["memories"])


_PARTS: limits.Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["type", "text"],
        "properties": {
            "type": {"enum": ["text", "input_text"]},
            "text": {"type": "string", **limits.TEXT},
        },
    },
}


class TurnInput(Input):
    """One message of a conversation; other fields of OpenAI's messages are refused."""

    role: str = Field(json_schema_extra=limits.ROLE)
    content: str | list[dict[str, Any]] = Field(
        description="Text, or OpenAI's content parts when all of them are text.",
        json_schema_extra={"anyOf": [{"type": "string", **limits.TEXT}, _PARTS]},
    )
    name: str | None = Field(
        default=None,
        description="Who speaks; the role when left out.",
        json_schema_extra=limits.line(256),
    )
    created_at: Time | None = Field(default=None, description="Now when left out.")
    metadata: dict[str, Any] = Field(default={})

    def to_domain(self, param: str) -> NewTurn:
        """Raises InvalidRequest when a content part is no text."""
        return NewTurn(
            role=self.role,
            content=_text_of(self.content, param=f"{param}.content"),
            name=self.name,
            created_at=self.created_at,
            metadata=self.metadata,
        )


class TurnsInput(Input):
    """POST /v1/memcubes/{id}/turns: all are added, or none."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "session_id": "call-17",
                    "messages": [
                        {"role": "user", "name": "Ada", "content": "My parcel is late."},
                        {"role": "assistant", "content": "I am sorry. Which order is it?"},
                    ],
                }
            ]
        }
    )

    messages: list[TurnInput] = Field(
        description=f"At most {MAX_BATCH}, in order.", json_schema_extra=limits.BATCH
    )
    session_id: str | None = Field(
        default=None,
        description="Turns of earlier calls with this id come before these.",
        json_schema_extra=limits.SESSION,
    )
    reason: Reason = None


@router.post(
    "/v1/memcubes/{cube_id}/turns",
    summary="Add chat turns",
    status_code=201,
    response_model=ListReply[MemoryReply],
    responses=examples.answers(examples.page(examples.MEMORY), 201),
    dependencies=TAKES_KEY,
)
async def add_turns(call: CurrentCall, cube_id: PathId, body: TurnsInput) -> Response:
    """Keep a conversation: a memory per turn with speaker and time, linked by `next` edges."""
    turns = [turn.to_domain(f"messages[{index}]") for index, turn in enumerate(body.messages)]

    def add() -> Response:
        added = call.mos.add_turns(
            call.actor, cube_id, turns, session_id=body.session_id, reason=body.reason
        )
        data = [MemoryReply.model_validate(memory) for memory in added]
        return render(ListReply[MemoryReply](data=data), status=201)

    return await answer_once(call, add)


def _text_of(content: str | list[dict[str, Any]], *, param: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.get("text")
        if part.get("type") not in ("text", "input_text") or not isinstance(text, str):
            raise InvalidRequest(
                f"{param}[{index}] is no text; only text can be remembered",
                param=f"{param}[{index}]",
            )
        texts.append(text)
    return "\n".join(texts)
