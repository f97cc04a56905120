"""The engine client that memory chats go through.

vLLM's serving code calls `generate` on it as on its own. It attaches what permits memory (the
cache salt and the ticket) after vLLM has logged the request, and takes what the connector
reports off the outputs before vLLM builds the reply. So neither appears in a log or a reply.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from memos_vllm.engine.ticket import TICKET_KEY, TicketSigner


@dataclass(slots=True)
class MemoryCall:
    """One chat's permission to use memory, and what came of it.

    Attributes:
        cache_salt: isolates the blocks of these cubes.
        scope: where artifacts are looked up and saved; None for a chat without activation
            memory.
        find_head: given the prompt's token ids, answers how many of them are memory and
            whether they may be kept in the store.
        session: names a conversation whose blocks are kept too.
        retry_save: save the head even when that failed a moment ago.
        head: the prompt's memory tokens, and `saves` whether they may go to the store; known
            once the prompt is rendered.
        report: what the connector did, once the engine has answered.
    """

    cache_salt: str
    scope: str | None = None
    find_head: Callable[[list[int]], Awaitable[tuple[int, bool]]] | None = None
    session: str | None = None
    retry_save: bool = False
    head: list[int] = field(default_factory=list)
    saves: bool = False
    report: dict[str, Any] = field(default_factory=dict)


class MemoryEngineClient:
    """vLLM's engine client for one chat, with `generate` permitting and observing its memory.

    One per chat: vLLM calls `generate` when it likes, for a streamed beam search only after the
    serving call has returned, and every such request must carry the chat's salt.
    """

    def __init__(self, inner: EngineClient, signer: TicketSigner, call: MemoryCall) -> None:
        self._inner = inner
        self._signer = signer
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        call = self._call
        prompt = {**prompt, "cache_salt": call.cache_salt}
        sampling_params = copy.copy(sampling_params)
        extra = dict(sampling_params.extra_args or {})
        extra.pop("kv_transfer_params", None)
        token_ids = prompt.get("prompt_token_ids")
        if call.scope is not None and call.find_head is not None and token_ids:
            head_tokens, call.saves = await call.find_head(token_ids)
            call.head = token_ids[:head_tokens]
            ticket = self._signer.sign(
                request_id=request_id,
                samples=sampling_params.n,
                scope=call.scope,
                cache_salt=call.cache_salt,
                head_tokens=head_tokens,
                save=call.saves,
                retry_save=call.retry_save,
                session=call.session,
            )
            extra["kv_transfer_params"] = {TICKET_KEY: ticket}
        sampling_params.extra_args = extra or None
        outputs = self._inner.generate(prompt, sampling_params, request_id, **options)
        # Closed with this one, so that a client that goes away aborts its request at once.
        async with aclosing(outputs):
            async for output in outputs:
                self._observe(call, output)
                yield output

    @staticmethod
    def _observe(call: MemoryCall, output: RequestOutput) -> None:
        params, output.kv_transfer_params = output.kv_transfer_params, None
        if isinstance(params, dict) and TICKET_KEY in params and not call.report:
            call.report.update(params[TICKET_KEY])
