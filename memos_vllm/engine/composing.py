"""Puts memory into a chat request, and renders it as vLLM does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMClientError, VLLMValidationError

from memos_vllm.activation.prefix import (
    PrefixMemory,
    compose_messages,
    neutralise,
    probe_messages,
    render_additions,
    render_memory_block,
)
from memos_vllm.activation.templates import TemplateTraits
from memos_vllm.domain.cube import CubeSnapshot
from memos_vllm.engine.recall import RecalledMemory
from memos_vllm.errors import ContextTooLong, InvalidRequest, TemplateError


@dataclass(frozen=True, slots=True)
class Composition:
    """What memory adds to a chat.

    Attributes:
        block: the first cube's activation memory as text; empty when it has none.
        additions: the other cubes' activation memories and what was found, as text.
        recalled: what was found, in the order in which it is numbered.
        first_number: the number of the first found memory in the additions.
    """

    block: str
    additions: str = ""
    recalled: tuple[RecalledMemory, ...] = ()
    first_number: int = 1


class Composer:
    """Composes prompts for one served model.

    Args:
        serving: vLLM's serving object, whose renderer is used.
        traits: how the model's template treats system text.
        special_tokens: texts that memory must not be able to write into the prompt.
    """

    def __init__(
        self, serving: OpenAIServingChat, traits: TemplateTraits, special_tokens: Sequence[str]
    ) -> None:
        self._serving = serving
        self._traits = traits
        self._special_tokens = tuple(special_tokens)

    @property
    def max_model_len(self) -> int:
        return int(self._serving.model_config.max_model_len)

    def compose(
        self, snapshots: Sequence[CubeSnapshot], recalled: Sequence[RecalledMemory] = ()
    ) -> Composition:
        """The text of these cubes' memory, the first one's in front."""
        first, others = snapshots[0], snapshots[1:]
        block = ""
        if first.memories or first.preamble:
            block = render_memory_block(
                first.preamble, first.memories, forbidden=self._special_tokens
            )
        rest: list[PrefixMemory] = [memory for cube in others for memory in cube.memories]
        additions = render_additions(
            [*rest, *recalled], forbidden=self._special_tokens, alone=not first.memories
        )
        return Composition(block, additions, tuple(recalled), len(rest) + 1)

    def with_memory(
        self, request: ChatCompletionRequest, composition: Composition
    ) -> ChatCompletionRequest:
        """The request as vLLM serves it: memory in its place, nothing of ours left.

        Raises:
            InvalidRequest: a message is none of a chat's; vLLM also takes those of Harmony, and
                refuses them only later, where its templates would read them.
        """
        for index, message in enumerate(request.messages):
            if not isinstance(message, dict) or "role" not in message:
                raise InvalidRequest(
                    f"messages[{index}] has no role", param=f"messages[{index}].role"
                )
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

    def usual_chat(self) -> ChatCompletionRequest:
        """A chat that leaves every template option at its default."""
        asked: list[Any] = [{"role": "user", "content": "Hello."}]
        model = str(self._serving.models.base_model_paths[0].name)
        return ChatCompletionRequest(model=model, messages=asked)

    async def probe(
        self, request: ChatCompletionRequest, composition: Composition
    ) -> tuple[list[int], list[int]]:
        """Render the two probe chats with this request's template options."""
        first, second = probe_messages(
            composition.block,
            default_system=self._traits.default_system,
            placement=self._traits.placement,
        )
        return (
            await self.render(_with_messages(request, first), composition),
            await self.render(_with_messages(request, second), composition),
        )

    async def render(self, request: ChatCompletionRequest, composition: Composition) -> list[int]:
        """Token ids of a request's prompt.

        Raises:
            ContextTooLong, TemplateError.
        """
        try:
            result = await self._serving.online_renderer.render_chat(request)
        except (ValueError, VLLMClientError) as error:
            raise self._render_error(str(error), composition) from error
        if isinstance(result, ErrorResponse):
            raise self._render_error(result.error.message, composition)
        _, engine_inputs = result
        return list(engine_inputs[0].get("prompt_token_ids") or ())

    def explained(self, error: VLLMValidationError, composition: Composition) -> Exception:
        """vLLM's error; of a prompt that is too long, with how much of it is memory."""
        has_memory = composition.block or composition.additions
        if error.parameter not in ("input_text", "input_tokens") or not has_memory:
            unchanged: Exception = error
            return unchanged
        tokens = self._memory_tokens(composition)
        if tokens >= self.max_model_len:
            return ContextTooLong(memory_tokens=tokens, max_model_len=self.max_model_len)
        return InvalidRequest(
            f"{error.args[0]} The memory of the cubes takes {tokens} of these tokens.",
            param="messages",
        )

    def count_note_tokens(self, text: str) -> int:
        """Tokens of a found memory as the prompt shows it."""
        return self.count_tokens(neutralise(text, self._special_tokens))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text for the served model, without any that a chat adds."""
        tokenizer = self._serving.renderer.tokenizer
        assert tokenizer is not None
        return len(tokenizer.encode(text, add_special_tokens=False))

    def _memory_tokens(self, composition: Composition) -> int:
        return self.count_tokens(composition.block + composition.additions)

    def _render_error(self, message: str, composition: Composition) -> InvalidRequest:
        tokens = self._memory_tokens(composition)
        if tokens >= self.max_model_len:
            return ContextTooLong(memory_tokens=tokens, max_model_len=self.max_model_len)
        return TemplateError(
            f"the model's chat template cannot render this chat: {message}", param="messages"
        )


def _with_messages(request: ChatCompletionRequest, messages: list[Any]) -> ChatCompletionRequest:
    return request.model_copy(
        update={"messages": messages, "cache_salt": None, "kv_transfer_params": None}
    )
