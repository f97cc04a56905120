"""Where the memory in a prompt ends: the head of a rendered chat.

Text around a memory block depends on the model's template, on tools and on template options, so
the head is found on token ids: what two probes share, chats that say different things right
after the block.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memos_vllm.activation.prefix import head_of

# Request fields that templates see before or around the system turn.
_TEMPLATE_FIELDS = (
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "reasoning_effort",
    "tool_choice",
    "tools",
)
_MAX_HEADS = 128
# A head that does not fit a prompt (the date in the template has moved, say) is looked for
# again, but not with every request of a template that moves it always.
_REPROBE_SECONDS = 60.0

# Length and digest of a head that a stored artifact was made of.
KnownHead = tuple[int, str]
Prober = Callable[[], Awaitable[tuple[list[int], list[int]]]]


@dataclass(slots=True)
class _Head:
    token_ids: list[int]
    probed_at: float
    uses: int = 0


class HeadCache:
    """Remembers the head of each (memory block, template variant)."""

    def __init__(
        self,
        *,
        on_miss: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_miss = on_miss
        self._clock = clock
        self._heads: OrderedDict[str, _Head] = OrderedDict()
        self.misses = 0

    async def find(
        self,
        key: str,
        prompt: list[int],
        probe: Prober,
        *,
        usual: bool,
        known: Callable[[], Awaitable[Sequence[KnownHead]]],
    ) -> tuple[int, bool]:
        """How many tokens of `prompt` are memory, and whether they may go to the store.

        Args:
            key: from `variant_key`.
            probe: renders the two probe chats to token ids.
            known: heads of current artifacts: one that opens this prompt saves the probes,
                which a server just started would pay on its first chat.
            usual: the request sets no template options. Heads that depend on options go to
                the store from their second use on, so that a caller who sends new tools with
                each request cannot push other artifacts out.
        """
        head = self._heads.get(key)
        if head is None or (
            not _starts_with(prompt, head.token_ids)
            and self._clock() - head.probed_at > _REPROBE_SECONDS
        ):
            token_ids = _opening(prompt, await known()) or head_of(*await probe())
            head = _Head(token_ids, self._clock())
            self._heads[key] = head
            if len(self._heads) > _MAX_HEADS:
                self._heads.popitem(last=False)
        self._heads.move_to_end(key)
        head.uses += 1
        if _starts_with(prompt, head.token_ids):
            return len(head.token_ids), usual or head.uses > 1
        self.misses += 1
        self._on_miss()
        return len(head_of(prompt, head.token_ids)), False


def head_digest(head: Sequence[int]) -> str:
    """Names a head by its token ids."""
    return hashlib.blake2b(array("I", head).tobytes(), digest_size=16).hexdigest()


def _opening(prompt: list[int], known: Sequence[KnownHead]) -> list[int]:
    """The longest known head that the prompt opens with, or nothing."""
    for length, digest in sorted(known, reverse=True):
        if length < len(prompt) and head_digest(prompt[:length]) == digest:
            return prompt[:length]
    return []


def variant_key(block: str, request: Any) -> str:
    """Names a memory block as rendered for this request's template options."""
    options = {name: getattr(request, name, None) for name in _TEMPLATE_FIELDS}
    encoded = json.dumps([block, options], default=_plain, sort_keys=True).encode()
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def is_usual(request: Any) -> bool:
    """Whether the request leaves every template option at its default."""
    # Without tools, vLLM fills in a tool choice of its own ("none").
    return not any(
        getattr(request, name, None) for name in _TEMPLATE_FIELDS if name != "tool_choice"
    )


def _plain(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    return dump() if dump is not None else repr(value)


def _starts_with(prompt: list[int], head: list[int]) -> bool:
    return prompt[: len(head)] == head
