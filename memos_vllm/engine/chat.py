"""Chat with memory: from a request with `memcube_id` to vLLM's own serving code and back."""

from __future__ import annotations

import asyncio
import copy
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fastapi import Request
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMClientError, VLLMValidationError

from memos_vllm.activation.prefix import (
    compose_messages,
    head_of,
    probe_messages,
    render_additions,
    render_memory_block,
)
from memos_vllm.activation.templates import TemplateTraits
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN, Principal
from memos_vllm.domain.artifact import ActivationState
from memos_vllm.domain.cube import CubeSnapshot
from memos_vllm.domain.usage import UsageEvent
from memos_vllm.engine.heads import HeadCache, KnownHead, is_usual, variant_key
from memos_vllm.engine.observer import MemoryCall, MemoryEngineClient
from memos_vllm.engine.options import MemoryOptions
from memos_vllm.engine.secrets import ServerKeys, artifact_scope, cache_salt
from memos_vllm.engine.sse import with_memos
from memos_vllm.engine.stats import api_counters
from memos_vllm.engine.ticket import TicketSigner
from memos_vllm.errors import ContextTooLong, InvalidRequest, TemplateError


@dataclass(frozen=True, slots=True)
class Composition:
    """What memory adds to a chat.

    Attributes:
        block: the first cube's activation memory as text; empty when it has none.
        additions: the other cubes' memories as text.
    """

    block: str
    additions: str


class MemoryChat:
    """Serves chats that name cubes.

    Args:
        mos: the control plane.
        serving: vLLM's serving object; each chat calls a copy with an engine client of its own.
        signer: signs the tickets of these chats.
        keys: of this data folder.
        traits: how the model's template treats system text.
        special_tokens: texts that memory must not be able to write into the prompt.
        on_usage: told what each chat used; must not block.
        on_served: told of the first chat with a version of a cube: its head's token ids and
            how many of them are kept in the store, or will be; must not block.
    """

    def __init__(
        self,
        *,
        mos: Mos,
        serving: OpenAIServingChat,
        keys: ServerKeys,
        signer: TicketSigner,
        traits: TemplateTraits,
        special_tokens: Sequence[str],
        on_usage: Callable[[list[UsageEvent]], None],
        on_served: Callable[[CubeSnapshot, list[int], int], None],
    ) -> None:
        self._mos = mos
        self._serving = serving
        self._keys = keys
        self._signer = signer
        self._traits = traits
        self._special_tokens = tuple(special_tokens)
        self._on_usage = on_usage
        self._on_served = on_served
        self.heads = HeadCache(on_miss=api_counters()[1].inc)
        self._scopes: dict[str, str] = {}
        # Cube -> the version whose artifact the catalog has been told of.
        self._recorded: dict[str, int] = {}

    async def complete(
        self,
        request: ChatCompletionRequest,
        raw_request: Request,
        *,
        principal: Principal,
        cube_ids: Sequence[str],
        options: MemoryOptions,
    ) -> AsyncIterator[str] | dict[str, Any] | ErrorResponse:
        """Answer a chat from vLLM's serving code with these cubes' memory in the prompt.

        Returns:
            A stream of server-sent events, a reply body, or vLLM's error.
        Raises:
            NotFound, InvalidRequest: as the HTTP contract says.
        """
        snapshots = await asyncio.to_thread(self._mos.snapshots, principal, cube_ids)
        composition = self._compose(snapshots)
        composed = self._with_memory(request, composition)
        call = self._permit(composed, snapshots, composition, options)
        serving = copy.copy(self._serving)
        serving.engine_client = self.engine_for(call)
        try:
            answer = await serving.create_chat_completion(composed, raw_request)
        except VLLMValidationError as error:
            raise self._explained(error, composition) from error
        if isinstance(answer, ErrorResponse):
            return answer

        def memos() -> dict[str, Any]:
            return self._finish(snapshots, call, options)

        if isinstance(answer, ChatCompletionResponse):
            return {**answer.model_dump(), "memos": memos()}
        return with_memos(answer, memos)

    def engine_for(self, call: MemoryCall) -> MemoryEngineClient:
        """The engine client whose requests may use this call's memory, and no other."""
        return MemoryEngineClient(self._serving.engine_client, self._signer, call)

    async def bake_prompt(self, snapshot: CubeSnapshot) -> tuple[list[int], int]:
        """The head of a plain chat with this cube, plus one token, and the head's length.

        Raises:
            ContextTooLong: it does not fit the model's context.
            TemplateError: the model's template refuses it.
        """
        composition = self._compose([snapshot])
        first, second = await self._probe(self._usual_chat(), composition)
        head = head_of(first, second)
        return first[: len(head) + 1], len(head)

    def scope_of(self, snapshots: Sequence[CubeSnapshot]) -> str:
        """Where the artifacts of this composition live: under its first cube."""
        first = snapshots[0]
        scope = artifact_scope(self._keys.salt, [(first.id, first.epoch)])
        self._scopes[first.id] = scope
        return scope

    def known_scope(self, cube_id: str) -> str | None:
        """The scope of a cube that this process has served, or None."""
        return self._scopes.get(cube_id)

    @property
    def model_name(self) -> str:
        """Name under which the base model is served."""
        return str(self._serving.models.base_model_paths[0].name)

    def salt_of(self, snapshots: Sequence[CubeSnapshot]) -> str:
        return cache_salt(self._keys.salt, [(cube.id, cube.epoch) for cube in snapshots])

    # --- composing ----------------------------------------------------------------------

    def _compose(self, snapshots: Sequence[CubeSnapshot]) -> Composition:
        first, others = snapshots[0], snapshots[1:]
        block = ""
        if first.memories or first.preamble:
            block = render_memory_block(
                first.preamble, first.memories, forbidden=self._special_tokens
            )
        rest = [memory for cube in others for memory in cube.memories]
        additions = render_additions(rest, forbidden=self._special_tokens) if rest else ""
        return Composition(block, additions)

    def _with_memory(
        self, request: ChatCompletionRequest, composition: Composition
    ) -> ChatCompletionRequest:
        """The request as vLLM serves it: memory in its place, nothing of ours left."""
        composed = compose_messages(
            request.messages,
            block=composition.block,
            additions=composition.additions,
            default_system=self._traits.default_system,
            placement=self._traits.placement,
        )
        plain = _with_messages(request, composed)
        for name in ("memcube_id", "mem_cube_id", "memos"):
            if hasattr(plain, name):
                setattr(plain, name, None)
        if plain.vllm_xargs:
            plain.vllm_xargs = {
                key: value for key, value in plain.vllm_xargs.items() if key != "kv_transfer_params"
            }
        return plain

    def _usual_chat(self) -> ChatCompletionRequest:
        """A chat that leaves every template option at its default."""
        asked: list[Any] = [{"role": "user", "content": "Hello."}]
        return ChatCompletionRequest(model=self.model_name, messages=asked)

    async def _probe(
        self, request: ChatCompletionRequest, composition: Composition
    ) -> tuple[list[int], list[int]]:
        """Render the two probe chats with this request's template options."""
        first, second = probe_messages(
            composition.block,
            default_system=self._traits.default_system,
            placement=self._traits.placement,
        )
        return (
            await self._render(_with_messages(request, first), composition),
            await self._render(_with_messages(request, second), composition),
        )

    async def _render(self, request: ChatCompletionRequest, composition: Composition) -> list[int]:
        try:
            result = await self._serving.online_renderer.render_chat(request)
        except (ValueError, VLLMClientError) as error:
            raise self._render_error(str(error), composition) from error
        if isinstance(result, ErrorResponse):
            raise self._render_error(result.error.message, composition)
        _, engine_inputs = result
        return list(engine_inputs[0].get("prompt_token_ids") or ())

    def _permit(
        self,
        request: ChatCompletionRequest,
        snapshots: Sequence[CubeSnapshot],
        composition: Composition,
        options: MemoryOptions,
    ) -> MemoryCall:
        if not options.activation:
            # A salt of its own: nothing is reused, nothing is found again.
            return MemoryCall(cache_salt=secrets.token_hex(32))
        if not snapshots[0].memories:
            # At most a preamble: text in the prompt, and nothing that was ever baked.
            return MemoryCall(cache_salt=self.salt_of(snapshots))
        key = variant_key(composition.block, request)

        async def find_head(prompt: list[int]) -> tuple[int, bool]:
            return await self.heads.find(
                key,
                prompt,
                lambda: self._probe(request, composition),
                usual=is_usual(request),
                known=lambda: asyncio.to_thread(self._known_heads, snapshots[0]),
            )

        return MemoryCall(
            cache_salt=self.salt_of(snapshots),
            scope=self.scope_of(snapshots),
            find_head=find_head,
            session=options.session_id,
        )

    def _known_heads(self, cube: CubeSnapshot) -> list[KnownHead]:
        """Heads of the artifacts that hold exactly this version of the cube's memory."""
        versions = tuple((memory.id, memory.version) for memory in cube.memories)
        return [
            (record.tokens, record.head_key)
            for record in self._mos.list_artifacts(cube.id)
            if record.state is ActivationState.READY and record.memory_versions == versions
        ]

    async def warm_up(self) -> None:
        """Do once what the first chat would be slow at, for the cube baked last: its queries, its
        rendering and the search for its head, some 10 ms."""
        records = await asyncio.to_thread(self._mos.list_artifacts)
        if not records:
            return
        latest = max(records, key=lambda record: record.created_at)
        snapshots = await asyncio.to_thread(self._mos.snapshots, LOCAL_ADMIN, [latest.cube_id])
        composition = self._compose(snapshots)
        composed = self._with_memory(self._usual_chat(), composition)
        call = self._permit(composed, snapshots, composition, MemoryOptions())
        if call.find_head is not None:
            await call.find_head(await self._render(composed, composition))

    async def refuse_unfit(self, snapshot: CubeSnapshot) -> None:
        """Raise ContextTooLong or TemplateError when this cube's memory could never be used."""
        prompt, _ = await self.bake_prompt(snapshot)
        limit = self._serving.model_config.max_model_len
        if len(prompt) >= limit:
            raise ContextTooLong(memory_tokens=len(prompt), max_model_len=limit)

    # --- answering ----------------------------------------------------------------------

    def _finish(
        self, snapshots: Sequence[CubeSnapshot], call: MemoryCall, options: MemoryOptions
    ) -> dict[str, Any]:
        """The reply's `memos` object; also notes the use of what was in the prompt."""
        report = call.report
        activation = {
            "tokens": report.get("tokens", 0),
            "cached_tokens": report.get("cached_tokens", 0),
            "source": report.get("source", "none"),
        }
        self._note_usage(snapshots, activation)
        first = snapshots[0]
        if call.saves and self._recorded.get(first.id) != first.version:
            self._recorded[first.id] = first.version
            self._on_served(first, call.head, report.get("kept_tokens", 0))
        return {
            "cubes": [{"id": cube.id, "version": cube.version} for cube in snapshots],
            "activation": activation,
            "retrieved": [],
            "adapter": None,
        }

    def _note_usage(self, snapshots: Sequence[CubeSnapshot], activation: dict[str, Any]) -> None:
        now = datetime.now(UTC)
        events = [
            UsageEvent(
                cube_id=cube.id,
                memory_ids=tuple(memory.id for memory in cube.memories),
                tokens=activation["tokens"] if position == 0 else 0,
                cached_tokens=activation["cached_tokens"] if position == 0 else 0,
                source=activation["source"] if position == 0 else "none",
                at=now,
            )
            for position, cube in enumerate(snapshots)
        ]
        self._on_usage(events)

    # --- errors -------------------------------------------------------------------------

    def _render_error(self, message: str, composition: Composition) -> InvalidRequest:
        tokens = self._count_tokens(composition)
        limit = self._serving.model_config.max_model_len
        if tokens >= limit:
            return ContextTooLong(memory_tokens=tokens, max_model_len=limit)
        return TemplateError(
            f"the model's chat template cannot render this chat: {message}", param="messages"
        )

    def _explained(self, error: VLLMValidationError, composition: Composition) -> Exception:
        """vLLM's error; of a prompt that is too long, with how much of it is memory."""
        has_memory = composition.block or composition.additions
        if error.parameter not in ("input_text", "input_tokens") or not has_memory:
            unchanged: Exception = error
            return unchanged
        tokens = self._count_tokens(composition)
        limit = self._serving.model_config.max_model_len
        if tokens >= limit:
            return ContextTooLong(memory_tokens=tokens, max_model_len=limit)
        return InvalidRequest(
            f"{error.args[0]} The memory of the cubes takes {tokens} of these tokens.",
            param="messages",
        )

    def _count_tokens(self, composition: Composition) -> int:
        tokenizer = self._serving.renderer.tokenizer
        assert tokenizer is not None
        return len(tokenizer.encode(composition.block + composition.additions))


def _with_messages(request: ChatCompletionRequest, messages: list[Any]) -> ChatCompletionRequest:
    return request.model_copy(
        update={"messages": messages, "cache_salt": None, "kv_transfer_params": None}
    )
