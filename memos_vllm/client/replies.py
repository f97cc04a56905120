"""What a chat returns: the answer, and which memory it was built on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from memos_vllm.client.errors import UnexpectedReply
from memos_vllm.client.fields import Fields
from memos_vllm.client.objects import Json


@dataclass(frozen=True, slots=True)
class ActivationUse:
    """What the connector did for one chat; `source` is resident, store, computed or none."""

    tokens: int
    cached_tokens: int
    source: str


@dataclass(frozen=True, slots=True)
class RetrievedMemory:
    """A memory that was looked up for a chat.

    Args:
        score: 0 to 1.
        number: under which the model saw it, as answers may cite it.
        tokens: that it took in the prompt.
        source: where it comes from, in one line; None for a plain note.
    """

    id: str
    score: float
    number: int | None
    tokens: int | None
    source: str | None

    @classmethod
    def from_json(cls, body: object) -> RetrievedMemory:
        found = Fields(body, "retrieved memory")
        return cls(
            id=found.text("id"),
            score=found.number("score", default=0.0),
            number=found.optional_count("number"),
            tokens=found.optional_count("tokens"),
            source=found.optional_text("source"),
        )


@dataclass(frozen=True, slots=True)
class Remembered:
    """What was kept of a chat: the new memories, and the job that reads facts out of them."""

    memory_ids: tuple[str, ...]
    job: str | None

    @classmethod
    def from_json(cls, body: object) -> Remembered:
        kept = Fields(body, "memos.remembered")
        return cls(memory_ids=kept.names("memory_ids"), job=kept.optional_text("job"))


@dataclass(frozen=True, slots=True)
class ChatMemos:
    """The `memos` object of a chat reply: which memory the answer was built on.

    Args:
        retrieved: memories that were looked up for it, in the order of the prompt.
        remembered: what was kept of this turn; None when nothing was asked for or kept.
        warnings: what could not be done for this chat, and why.
    """

    cubes: tuple[tuple[str, int], ...]
    activation: ActivationUse
    retrieved: tuple[RetrievedMemory, ...]
    remembered: Remembered | None
    warnings: tuple[str, ...]
    adapter: Any
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, body: object) -> ChatMemos:
        memos = Fields(body, "memos object")
        activation = memos.part("activation")
        remembered = memos.raw.get("remembered")
        return cls(
            cubes=memos.each("cubes", _cube_version),
            activation=ActivationUse(
                tokens=activation.count("tokens", default=0),
                cached_tokens=activation.count("cached_tokens", default=0),
                source=activation.optional_text("source") or "none",
            ),
            retrieved=memos.each("retrieved", RetrievedMemory.from_json),
            remembered=None if remembered is None else Remembered.from_json(remembered),
            warnings=memos.names("warnings"),
            adapter=memos.raw.get("adapter"),
            raw=memos.raw,
        )


@dataclass(frozen=True, slots=True)
class ChatReply:
    """One answer. `text` is the first choice's; `message` has its tool calls and the like."""

    text: str
    message: Json
    finish_reason: str | None
    model: str
    usage: Json
    memos: ChatMemos | None
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, body: object) -> ChatReply:
        reply = Fields(body, "chat completion")
        choices = reply.each("choices", lambda choice: Fields(choice, "choice"))
        if not choices:
            raise UnexpectedReply("the server's chat completion has no choices")
        message = choices[0].part("message")
        memos = reply.raw.get("memos")
        return cls(
            text=message.optional_text("content") or "",
            message=message.raw,
            finish_reason=choices[0].optional_text("finish_reason"),
            model=reply.optional_text("model") or "",
            usage=reply.mapping("usage"),
            memos=None if memos is None else ChatMemos.from_json(memos),
            raw=reply.raw,
        )


def _cube_version(body: object) -> tuple[str, int]:
    cube = Fields(body, "memos.cubes entry")
    return cube.text("id"), cube.count("version")
