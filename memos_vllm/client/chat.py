"""Chat, whole or streamed, for the blocking and the awaited client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, overload

import httpx

from memos_vllm.client.errors import UnexpectedReply
from memos_vllm.client.fields import Fields
from memos_vllm.client.flow import Awaited, Blocking
from memos_vllm.client.replies import ChatReply
from memos_vllm.client.session import Session
from memos_vllm.client.steps import Flow
from memos_vllm.client.stream import AsyncChatStream, ChatStream
from memos_vllm.client.wire import Call
from memos_vllm.errors import InvalidRequest

# A conversation, or just the user's words.
Messages: TypeAlias = str | Sequence[Mapping[str, object]]
Retrieve: TypeAlias = Mapping[str, object] | bool | None
# Whether a turn is kept as it was said (True, "fast"), or read for facts too ("fine"); an object
# with "mode" and "into" also names the cube, among those of the chat.
Remember: TypeAlias = bool | Literal["fast", "fine"] | Mapping[str, str]

_OUR_FIELDS = {"model", "messages", "stream", "memcube_id", "mem_cube_id", "memos"}


def ask_models(session: Session) -> Flow[tuple[str, ...]]:
    """The names that this server takes as `model`, the served model first."""

    def parse(body: object) -> tuple[str, ...]:
        models = Fields(body, "model list")
        return models.each("data", lambda model: Fields(model, "model").text("id"))

    return (yield from session.call(Call("GET", "/v1/models", parse)))


def chat_call(
    session: Session,
    messages: Messages,
    *,
    cubes: Sequence[str],
    model: str | None,
    retrieve: Retrieve,
    remember: Remember,
    session_id: str | None,
    activation: bool,
    adapter: bool,
    options: Mapping[str, object] | None,
    stream: bool,
) -> Flow[Call[ChatReply]]:
    """The chat request; asks once for the served model when none is named.

    Raises:
        InvalidRequest: `options` holds a field that has an argument of its own.
    """
    options = dict(options or {})
    if taken := _OUR_FIELDS & options.keys():
        raise InvalidRequest(
            f"{', '.join(sorted(taken))} cannot be given in options; it is an argument of chat",
            param="options",
        )
    if isinstance(cubes, str):
        cubes = (cubes,)
    if model is None:
        if session.model is None:
            names = yield from ask_models(session)
            if not names:
                raise UnexpectedReply("the server serves no model")
            session.model = names[0]
        model = session.model
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    body: dict[str, object] = {"model": model, "messages": list(messages), **options}
    if cubes:
        body["memcube_id"] = cubes[0] if len(cubes) == 1 else list(cubes)
    memos = _memos(
        retrieve=retrieve,
        remember=remember,
        session_id=session_id,
        activation=activation,
        adapter=adapter,
    )
    if memos:
        body["memos"] = memos
    if stream:
        body["stream"] = True
        body.setdefault("stream_options", {"include_usage": True})
    return Call(
        "POST",
        "/v1/chat/completions",
        ChatReply.from_json,
        body=body,
        # Asking again costs a generation and gives another answer.
        repeatable=False,
        slow=True,
    )


def _memos(
    *,
    retrieve: Retrieve,
    remember: Remember,
    session_id: str | None,
    activation: bool,
    adapter: bool,
) -> dict[str, object]:
    """The request's `memos` object: only what differs from the server's own choice."""
    memos: dict[str, object] = {}
    if isinstance(retrieve, Mapping):
        memos["retrieve"] = dict(retrieve)
    elif retrieve is False:
        memos["retrieve"] = False
    if remember:
        memos["remember"] = {"mode": remember} if isinstance(remember, str) else remember
    if session_id is not None:
        memos["session_id"] = session_id
    if not activation:
        memos["activation"] = False
    if not adapter:
        memos["adapter"] = False
    return memos


def _reply(session: Session, **arguments: Any) -> Flow[ChatReply]:
    call = yield from chat_call(session, stream=False, **arguments)
    return (yield from session.call(call))


def _opening(session: Session, **arguments: Any) -> Flow[httpx.Response]:
    call = yield from chat_call(session, stream=True, **arguments)
    return (yield from session.open_stream(call))


class BlockingChat(Blocking):
    """`chat` and `chat_stream`; a Cube puts its own id before `cubes`."""

    def _chat_cubes(self, cubes: Sequence[str]) -> Sequence[str]:
        return cubes

    def _remembering(self, remember: Remember) -> Remember:
        return remember

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        cubes: Sequence[str] = (),
        model: str | None = None,
        stream: Literal[False] = False,
        retrieve: Retrieve = None,
        remember: Remember = False,
        session_id: str | None = None,
        activation: bool = True,
        adapter: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> ChatReply: ...
    @overload
    def chat(
        self,
        messages: Messages,
        *,
        cubes: Sequence[str] = (),
        model: str | None = None,
        stream: Literal[True],
        retrieve: Retrieve = None,
        remember: Remember = False,
        session_id: str | None = None,
        activation: bool = True,
        adapter: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> ChatStream: ...
    def chat(
        self,
        messages: Messages,
        *,
        cubes: Sequence[str] = (),
        model: str | None = None,
        stream: bool = False,
        retrieve: Retrieve = None,
        remember: Remember = False,
        session_id: str | None = None,
        activation: bool = True,
        adapter: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> ChatReply | ChatStream:
        """Ask the model, with memory in its attention.

        Args:
            messages: OpenAI chat messages, or a text as the user's only message.
            cubes: the MemCubes to answer with, at most 8; on a Cube, those after itself.
            model: the served model's name; asked from the server once when not given.
            stream: return a ChatStream of text deltas.
            retrieve: `{"top_k": ..., "max_tokens": ...}`, or False for no retrieval; the server
                chooses when not given.
            remember: keep the question and its answer as memories of the first cube: True or
                "fast" as they were said, "fine" also as the facts that the model reads in them;
                `{"mode": ..., "into": CUBE}` keeps them in another of the chat's cubes.
            session_id: ties what is remembered, and warm KV, to one conversation.
            activation, adapter: False leaves that kind of memory out.
            options: any other parameter of an OpenAI chat request, as `temperature`.
        Raises:
            ApiError: the server refused it.
            ServerUnreachable, ReplyTimeout: no answer, or not all of it.
        """
        arguments: dict[str, Any] = {
            "messages": messages,
            "cubes": self._chat_cubes(cubes),
            "model": model,
            "retrieve": retrieve,
            "remember": self._remembering(remember),
            "session_id": session_id,
            "activation": activation,
            "adapter": adapter,
            "options": options,
        }
        if stream:
            return ChatStream.open(self, _opening(self._session, **arguments))
        return self._run(_reply(self._session, **arguments))

    def chat_stream(
        self,
        messages: Messages,
        *,
        cubes: Sequence[str] = (),
        model: str | None = None,
        retrieve: Retrieve = None,
        remember: Remember = False,
        session_id: str | None = None,
        activation: bool = True,
        adapter: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> ChatStream:
        """`chat(..., stream=True)`."""
        return self.chat(
            messages,
            cubes=cubes,
            model=model,
            stream=True,
            retrieve=retrieve,
            remember=remember,
            session_id=session_id,
            activation=activation,
            adapter=adapter,
            options=options,
        )


class AwaitedChat(Awaited):
    """BlockingChat, awaited. A stream may also be iterated over without awaiting it first."""

    def _chat_cubes(self, cubes: Sequence[str]) -> Sequence[str]:
        return cubes

    def _remembering(self, remember: Remember) -> Remember:
        return remember

    @overload
    async def chat(
        self,
        messages: Messages,
        *,
        cubes: Sequence[str] = (),
        model: str | None = None,
        stream: Literal[False] = False,
        retrieve: Retrieve = None,
        remember: Remember = False,
        session_id: str | None = None,
        activation: bool = True,
        adapter: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> ChatReply: ...
    @overload
    async def chat(
        self,
        messages: Messages,
        *,
        cubes: Sequence[str] = (),
        model: str | None = None,
        stream: Literal[True],
        retrieve: Retrieve = None,
        remember: Remember = False,
        session_id: str | None = None,
        activation: bool = True,
        adapter: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> AsyncChatStream: ...
    async def chat(
        self,
        messages: Messages,
        *,
        cubes: Sequence[str] = (),
        model: str | None = None,
        stream: bool = False,
        retrieve: Retrieve = None,
        remember: Remember = False,
        session_id: str | None = None,
        activation: bool = True,
        adapter: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> ChatReply | AsyncChatStream:
        """As `MOS.chat` and `Cube.chat`."""
        arguments: dict[str, Any] = {
            "messages": messages,
            "cubes": self._chat_cubes(cubes),
            "model": model,
            "retrieve": retrieve,
            "remember": self._remembering(remember),
            "session_id": session_id,
            "activation": activation,
            "adapter": adapter,
            "options": options,
        }
        if stream:
            return await AsyncChatStream(self, _opening(self._session, **arguments))
        return await self._run(_reply(self._session, **arguments))

    def chat_stream(
        self,
        messages: Messages,
        *,
        cubes: Sequence[str] = (),
        model: str | None = None,
        retrieve: Retrieve = None,
        remember: Remember = False,
        session_id: str | None = None,
        activation: bool = True,
        adapter: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> AsyncChatStream:
        """As `MOS.chat_stream`; `async for` it, or await it first to have it opened."""
        flow = _opening(
            self._session,
            messages=messages,
            cubes=self._chat_cubes(cubes),
            model=model,
            retrieve=retrieve,
            remember=self._remembering(remember),
            session_id=session_id,
            activation=activation,
            adapter=adapter,
            options=options,
        )
        return AsyncChatStream(self, flow)
