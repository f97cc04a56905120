"""Which text of a memory is embedded, and which is split into terms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from memos_vllm.domain.memory import Memory
from memos_vllm.plaintext.dates import written
from memos_vllm.plaintext.names import author_and_text

MAX_PROSE_CHARS: Final = 600
# "page 3", "turn 12": where something stands does not say what.
_PLACE_NUMBER = re.compile(r"\s*[^\W\d_]+\.?\s*\d+(?:\s*[-\u2013]\s*\d+)?(?=$|\W)")
_LETTERS = re.compile(r"[^\W\d_]{2,}")
_UNSPACED_PROSE = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{4,}")


@dataclass(frozen=True, slots=True)
class IndexedText:
    """A memory as the index reads it.

    Args:
        dense: what is embedded: what it is about.
        sparse: what becomes terms: also who said it, when, and its tags.
    """

    dense: str
    sparse: str


def indexed_text(memory: Memory) -> IndexedText:
    """The texts of a memory for the index; never blank.

    The name of the author is not embedded: a query's is compared with the author itself. Metadata
    counts where it is prose, such as the caption of a picture; ids and numbers are for filters.
    """
    source = memory.source
    author, said = author_and_text(source.author, memory.text)
    place = ". ".join(part for part in (source.title, _headings(source.locator)) if part)
    prose = " ".join(_prose(memory.metadata))[:MAX_PROSE_CHARS]
    body = " ".join(part for part in (said.strip(), prose) if part)
    when = written(source.created_at.date()) if source.created_at is not None else None
    more = [author, *memory.tags, when]
    return IndexedText(
        dense=f"{place}\n{body}" if place else body,
        sparse="\n".join(part for part in (place, body, *more) if part),
    )


def _headings(locator: str | None) -> str | None:
    """A locator behind the page or turn that it opens with; None when that is all."""
    if locator is None:
        return None
    opening = _PLACE_NUMBER.match(locator)
    left = locator if opening is None else locator[opening.end() :]
    return re.sub(r"\s+", " ", left).strip(" ,;:/|>\u203a\u00b7#") or None


def _prose(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _prose(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _prose(item)
    elif isinstance(value, str) and _is_prose(value.strip()):
        yield value.strip()


def _is_prose(value: str) -> bool:
    several_words = " " in value and len(_LETTERS.findall(value)) > 1
    return several_words or _UNSPACED_PROSE.search(value) is not None
