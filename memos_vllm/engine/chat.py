"""Chat with memory: from a request with `memcube_id` to vLLM's own serving code and back."""

from __future__ import annotations

import asyncio
import copy
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Sequence
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
from vllm.exceptions import VLLMValidationError

from memos_vllm.activation.prefix import head_of
from memos_vllm.control.mos import Mos
from memos_vllm.control.snapshots import Snapshots
from memos_vllm.domain.access import LOCAL_ADMIN, Principal
from memos_vllm.domain.artifact import ActivationState
from memos_vllm.domain.cube import CubeSnapshot
from memos_vllm.domain.usage import UsageEvent
from memos_vllm.engine.composing import Composer, Composition
from memos_vllm.engine.heads import HeadCache, KnownHead, is_usual, variant_key
from memos_vllm.engine.observer import MemoryCall, MemoryEngineClient
from memos_vllm.engine.options import MemoryOptions
from memos_vllm.engine.recall import Recall, Recalled
from memos_vllm.engine.remembering import TurnWriter
from memos_vllm.engine.secrets import ServerKeys, artifact_scope, cache_salt
from memos_vllm.engine.sse import heard, with_memos
from memos_vllm.engine.stats import api_counters, control_plane_wait
from memos_vllm.engine.ticket import TicketSigner
from memos_vllm.errors import ContextTooLong, MemosError

# Most that found memories take in a prompt when the request names no limit.
DEFAULT_RECALL_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class _Turn:
    """One chat on its way: who asked, with what memory, and what could not be had."""

    principal: Principal
    snapshots: Sequence[CubeSnapshot]
    composition: Composition
    call: MemoryCall
    options: MemoryOptions
    problem: str | None


class MemoryChat:
    """Serves chats that name cubes.

    Args:
        mos: the control plane.
        snapshots: what it says of cubes, as this server keeps it.
        serving: vLLM's serving object; each chat calls a copy with an engine client of its own.
        signer: signs the tickets of these chats.
        keys: of this data folder.
        composer: puts memory into prompts.
        recall: finds memories for chats.
        writer: keeps turns as memories.
        on_usage: told what each chat used; must not block.
        on_served: told of the first chat with a version of a cube: its head's token ids and
            how many of them are kept in the store, or will be; must not block.
    """

    def __init__(
        self,
        *,
        mos: Mos,
        snapshots: Snapshots,
        serving: OpenAIServingChat,
        keys: ServerKeys,
        signer: TicketSigner,
        composer: Composer,
        recall: Recall,
        writer: TurnWriter,
        on_usage: Callable[[list[UsageEvent]], None],
        on_served: Callable[[CubeSnapshot, list[int], int], None],
    ) -> None:
        self._mos = mos
        self._snapshots = snapshots
        self._serving = serving
        self._keys = keys
        self._signer = signer
        self._composer = composer
        self._recall = recall
        self._writer = writer
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
        with control_plane_wait().labels("rights").time():
            snapshots = await asyncio.to_thread(self._snapshots.get, principal, cube_ids)
            if options.remember is not None:
                into = options.remember.cube_among(cube_ids)
                await asyncio.to_thread(self._mos.require_writable, principal, into)
        recalled = await self._look_up(request, snapshots, principal, options)
        composition = self._composer.compose(snapshots, recalled.memories)
        composed = self._composer.with_memory(request, composition)
        call = self._permit(composed, snapshots, composition, options)
        turn = _Turn(principal, snapshots, composition, call, options, recalled.problem)
        serving = copy.copy(self._serving)
        serving.engine_client = self.engine_for(call)
        try:
            answer = await serving.create_chat_completion(composed, raw_request)
        except VLLMValidationError as error:
            raise self._composer.explained(error, composition) from error
        if isinstance(answer, ErrorResponse):
            return answer
        if isinstance(answer, ChatCompletionResponse):
            said = answer.choices[0].message.content or "" if answer.choices else ""
            return {**answer.model_dump(), "memos": await self._finish(turn, request, said)}
        pieces: list[str] = []
        if options.remember is not None:
            answer = heard(answer, pieces)
        return with_memos(answer, lambda: self._finish(turn, request, "".join(pieces)))

    def engine_for(self, call: MemoryCall) -> MemoryEngineClient:
        """The engine client whose requests may use this call's memory, and no other."""
        return MemoryEngineClient(self._serving.engine_client, self._signer, call)

    async def bake_prompt(self, snapshot: CubeSnapshot) -> tuple[list[int], int]:
        """The head of a plain chat with this cube, plus one token, and the head's length.

        Raises:
            ContextTooLong: it does not fit the model's context.
            TemplateError: the model's template refuses it.
        """
        composition = self._composer.compose([snapshot])
        first, second = await self._composer.probe(self._composer.usual_chat(), composition)
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

    def salt_of(self, snapshots: Sequence[CubeSnapshot], labels: Collection[str] = ()) -> str:
        """What keeps the blocks of these cubes, and of labelled text found in them, apart."""
        return cache_salt(
            self._keys.salt,
            [(cube.id, cube.epoch) for cube in snapshots],
            tuple(sorted(labels)),
        )

    # --- permitting ---------------------------------------------------------------------

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
        # Who shares blocks with labelled text has found the same labels, so may see them.
        salt = self.salt_of(snapshots, _labels_of(composition))
        if not snapshots[0].memories:
            # At most a preamble: text in the prompt, and nothing that was ever baked.
            return MemoryCall(cache_salt=salt)
        key = variant_key(composition.block, request)

        async def find_head(prompt: list[int]) -> tuple[int, bool]:
            return await self.heads.find(
                key,
                prompt,
                lambda: self._composer.probe(request, composition),
                usual=is_usual(request),
                known=lambda: asyncio.to_thread(self._known_heads, snapshots[0]),
            )

        return MemoryCall(
            cache_salt=salt,
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
        snapshots = await asyncio.to_thread(self._snapshots.get, LOCAL_ADMIN, [latest.cube_id])
        composition = self._composer.compose(snapshots)
        composed = self._composer.with_memory(self._composer.usual_chat(), composition)
        call = self._permit(composed, snapshots, composition, MemoryOptions())
        if call.find_head is not None:
            await call.find_head(await self._composer.render(composed, composition))

    async def refuse_unfit(self, snapshot: CubeSnapshot) -> None:
        """Raise ContextTooLong or TemplateError when this cube's memory could never be used."""
        prompt, _ = await self.bake_prompt(snapshot)
        limit = self._composer.max_model_len
        if len(prompt) >= limit:
            raise ContextTooLong(memory_tokens=len(prompt), max_model_len=limit)

    # --- answering ----------------------------------------------------------------------

    async def _look_up(
        self,
        request: ChatCompletionRequest,
        snapshots: Sequence[CubeSnapshot],
        principal: Principal,
        options: MemoryOptions,
    ) -> Recalled:
        """Memories of the plaintext tier that bear on this chat; none are asked for when the
        cubes hold none."""
        searched = [cube.id for cube in snapshots if cube.has_plaintext]
        if options.retrieve is None or not searched:
            return Recalled()
        with control_plane_wait().labels("search").time():
            return await self._recall.for_chat(
                principal,
                searched,
                request.messages,
                options.retrieve,
                known_texts=[memory.text for cube in snapshots for memory in cube.memories],
                max_tokens=min(DEFAULT_RECALL_TOKENS, self._composer.max_model_len // 4),
            )

    async def _finish(
        self, turn: _Turn, request: ChatCompletionRequest, said: str
    ) -> dict[str, Any]:
        """The reply's `memos` object; also notes what was used, and keeps the turn if asked."""
        call, composition = turn.call, turn.composition
        report = call.report
        activation = {
            "tokens": report.get("tokens", 0),
            "cached_tokens": report.get("cached_tokens", 0),
            "source": report.get("source", "none"),
        }
        self._note_usage(turn, activation)
        first = turn.snapshots[0]
        if call.saves and self._recorded.get(first.id) != first.version:
            self._recorded[first.id] = first.version
            self._on_served(first, call.head, report.get("kept_tokens", 0))
        memos: dict[str, Any] = {
            "cubes": [{"id": cube.id, "version": cube.version} for cube in turn.snapshots],
            "activation": activation,
            "retrieved": [
                {
                    "id": found.memory.id,
                    "score": round(found.score, 6),
                    "number": number,
                    "tokens": found.tokens,
                    "source": found.title or None,
                }
                for number, found in enumerate(composition.recalled, composition.first_number)
            ],
            "adapter": None,
        }
        warnings = [turn.problem] if turn.problem else []
        if turn.options.remember is not None:
            try:
                memos["remembered"] = await self._writer.keep(
                    turn.principal,
                    turn.options.remember.cube_among([cube.id for cube in turn.snapshots]),
                    request.messages,
                    said,
                    session_id=turn.options.session_id,
                    mode=turn.options.remember.mode,
                    # An answer that was given from labelled memories tells of them.
                    labels=sorted(_labels_of(composition)),
                )
            except MemosError as error:
                # The answer is there already; that it is not remembered must not take it back.
                warnings.append(f"this turn was not remembered: {error}")
        if warnings:
            memos["warnings"] = warnings
        return memos

    def _note_usage(self, turn: _Turn, activation: dict[str, Any]) -> None:
        now = datetime.now(UTC)
        events = [
            UsageEvent(
                cube_id=cube.id,
                memory_ids=(
                    *(memory.id for memory in cube.memories),
                    *(
                        found.memory.id
                        for found in turn.composition.recalled
                        if found.memory.cube_id == cube.id
                    ),
                ),
                tokens=activation["tokens"] if position == 0 else 0,
                cached_tokens=activation["cached_tokens"] if position == 0 else 0,
                source=activation["source"] if position == 0 else "none",
                at=now,
            )
            for position, cube in enumerate(turn.snapshots)
        ]
        self._on_usage(events)


def _labels_of(composition: Composition) -> set[str]:
    return {label for found in composition.recalled for label in found.memory.labels}
