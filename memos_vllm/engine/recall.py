"""Which found memories go into one chat's prompt."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memos_vllm.domain.access import Principal
from memos_vllm.domain.filters import HasTier
from memos_vllm.domain.memory import Memory, Source, Tier
from memos_vllm.domain.search import SearchHit, SearchQuery
from memos_vllm.engine.options import RetrieveOptions
from memos_vllm.errors import MemosError, NotFound
from memos_vllm.plaintext.store import PlaintextStore

logger = logging.getLogger(__name__)

# A chat does not wait long for what was written a moment ago; a search does.
_CATCH_UP_SECONDS = 2.0
# Fewer words than this ask about what was said before ("and how long does it take?").
_SHORT_WORDS = 6
_MAX_QUERY_CHARS = 4000
# What matches this much less than the best, or hardly at all, only distracts a model.
_LEAST_SHARE = 0.25
_LEAST_SCORE = 0.1
# Numbering, source line and blank lines of a note.
_NOTE_TOKENS = 4
_WHOLE_PREFIX = HasTier((Tier.PLAINTEXT,))


@dataclass(frozen=True, slots=True)
class RecalledMemory:
    """A found memory as the prompt shows it; `title` names its source."""

    memory: Memory
    score: float
    tokens: int

    @property
    def text(self) -> str:
        return self.memory.text

    @property
    def title(self) -> str:
        return source_line(self.memory.source)


@dataclass(frozen=True, slots=True)
class Recalled:
    """What was found for a chat, best first, and why nothing was when the search failed."""

    memories: tuple[RecalledMemory, ...] = ()
    problem: str | None = None


class Recall:
    """Finds memories for chats.

    Args:
        count_tokens: tokens of a text for the served model.
    """

    def __init__(self, plaintext: PlaintextStore, *, count_tokens: Callable[[str], int]) -> None:
        self._plaintext = plaintext
        self._count_tokens = count_tokens

    async def for_chat(
        self,
        principal: Principal,
        cube_ids: Sequence[str],
        messages: Sequence[Any],
        options: RetrieveOptions,
        *,
        known_texts: Iterable[str],
        max_tokens: int,
    ) -> Recalled:
        """Memories that bear on the last thing the user said, within the token budget.

        Args:
            known_texts: what the prompt holds already; none of it is repeated.
            max_tokens: most that they may take together when the options name no limit.
        Returns:
            Nothing, with the reason, when search is down: the chat goes on without.
        Raises:
            NotFound: a cube that the principal may not read.
        """
        text = query_text(messages)
        if not text.strip():
            return Recalled()
        query = SearchQuery(text=text, top_k=options.top_k, where=_WHOLE_PREFIX)
        try:
            found = await asyncio.to_thread(
                self._plaintext.search,
                principal,
                cube_ids,
                query,
                catch_up_seconds=_CATCH_UP_SECONDS,
            )
        except NotFound:
            raise
        except MemosError as error:
            logger.warning("memos: a chat goes on without found memories: %s", error)
            return Recalled(problem=str(error))
        limit = max_tokens if options.max_tokens is None else options.max_tokens
        return Recalled(await asyncio.to_thread(self._fit, found.hits, limit, known_texts))

    def _fit(
        self, hits: Sequence[SearchHit], max_tokens: int, known_texts: Iterable[str]
    ) -> tuple[RecalledMemory, ...]:
        seen = {_normal(text) for text in known_texts}
        floor = max(_LEAST_SCORE, _LEAST_SHARE * max((hit.score for hit in hits), default=0.0))
        # What a found memory takes the place of would only contradict it.
        replaced = {old for hit in hits for old in hit.memory.lineage.supersedes}
        left = max_tokens
        taken = []
        for hit in hits:
            if hit.score < floor or left <= _NOTE_TOKENS:
                # Best first: nothing better comes, or nothing more fits.
                break
            if hit.memory.id in replaced:
                continue
            # A promotion or a move that the index has not followed yet.
            if hit.memory.tier is not Tier.PLAINTEXT or _normal(hit.memory.text) in seen:
                continue
            seen.add(_normal(hit.memory.text))
            note = f"{source_line(hit.memory.source)}\n{hit.memory.text}"
            tokens = self._count_tokens(note) + _NOTE_TOKENS
            if tokens <= left:
                left -= tokens
                taken.append(RecalledMemory(hit.memory, hit.score, tokens))
        return tuple(taken)


def query_text(messages: Sequence[Any]) -> str:
    """What a chat asks: the last user message, after the one before when it is very short."""
    asked = [
        text
        for message in messages
        if isinstance(message, Mapping) and message.get("role") == "user"
        if (text := text_of(message.get("content"))).strip()
    ]
    if not asked:
        return ""
    last = asked[-1]
    if len(last.split()) < _SHORT_WORDS and len(asked) > 1:
        last = f"{asked[-2]}\n{last}"
    return last[-_MAX_QUERY_CHARS:].replace("\x00", " ")


def source_line(source: Source) -> str:
    """Where a memory comes from, in one line; empty for a plain note.

    >>> source_line(Source(kind="chunk", title="Handbook", locator="page 7"))
    'Handbook, page 7'
    """
    name = source.title or (None if source.kind == "turn" else source.uri)
    parts = [name, source.locator if name else None, source.author]
    if source.created_at is not None:
        parts.append(source.created_at.strftime("%-d %B %Y"))
    return ", ".join(part for part in parts if part)


def text_of(content: object) -> str:
    """The text of a message: a string, or the text parts of a list, one per line."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Iterable):
        return ""
    texts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()
