"""Who said a memory, and whom a query names.

In a conversation every memory has an author, and a question names one: "What did Ana buy?" What
Ana said of it is "I bought a bicycle", without her name, while the others say "Hi Ana!" all the
time. So a name is compared with the author, and not with the text.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from memos_vllm.plaintext.terms import STOP_WORDS, UNSPACED, WORD, normal_form

# What chats call whoever speaks when no one gave a name.
ROLES: Final = frozenset({"user", "assistant", "system", "developer", "tool", "function"})
MAX_NAME_WORDS: Final = 4
MAX_CANDIDATES: Final = 64
_MAX_NAME_CHARS = 48

_WORD = re.compile(rf"{WORD}|[{UNSPACED}]+")
_UNSPACED = re.compile(f"[{UNSPACED}]+")
_LABEL = re.compile(
    r"(?P<name>[^\W\d_][\w.'\u2019-]{0,31}(?: [^\W\d_][\w.'\u2019-]{0,31}){0,2})(?::\s+|\uff1a\s*)"
)
_LABELLED_LINE = re.compile(rf"^{_LABEL.pattern}", re.MULTILINE)
_LONGEST_UNSPACED_NAME = 4


@dataclass(frozen=True, slots=True)
class NamedQuery:
    """A query and the words of it that may be names.

    Args:
        candidates: where each name stands in the text, by its normal form.
    """

    text: str
    candidates: dict[str, list[tuple[int, int]]]

    def without(self, names: Collection[str]) -> str:
        """The text without these names; the whole text if no word would be left."""
        spans = sorted(span for name in names for span in self.candidates.get(name, ()))
        kept, end = [], 0
        for start, stop in spans:
            kept.append(self.text[end:start])
            end = max(end, stop)
        kept.append(self.text[end:])
        left = re.sub(r"\s+", " ", " ".join(kept)).strip()
        return left if _WORD.search(left) else self.text


def author_and_text(author: str | None, text: str) -> tuple[str | None, str]:
    """Who said `text`, and what was said.

    Without a given author, or with a mere role, a text that begins like "Ana: ..." names its own,
    unless several of its lines do: then it is a transcript. The label of a given author goes too.
    """
    if author is not None and author.casefold() in ROLES:
        author = None
    label = _LABEL.match(text)
    if label is None or label.end() == len(text):
        return author, text
    name = label["name"]
    if author is None:
        if name[0].islower() or len(_LABELLED_LINE.findall(text)) > 1:
            return None, text
        author = name
    elif not set(author_names(name)) & set(author_names(author)):
        return author, text
    return author, text[label.end() :]


def author_names(author: str | None) -> tuple[str, ...]:
    """The words of an author's name in normal form, by each of which a query may name them."""
    if author is None or author.casefold() in ROLES:
        return ()
    plain = normal_form(author)
    runs = _UNSPACED.findall(plain)
    words = [word for word in _WORD.findall(_UNSPACED.sub(" ", plain)) if len(word) > 1]
    named = [word for word in words if word not in STOP_WORDS] or words
    return tuple(dict.fromkeys(name[:_MAX_NAME_CHARS] for name in (runs + named)[:MAX_NAME_WORDS]))


def named_in(query: str) -> NamedQuery:
    """The words of a query that may name an author; at most 64.

    Where a query has capitals behind its first word, only words with one are names: "will" is
    none in "Where will Ana go?". In a query without any, every word but stop words may be one.
    """
    words = list(_WORD.finditer(query))
    cased = any(len(word[0]) > 1 and word[0][0].isupper() for word in words[1:])
    found: dict[str, list[tuple[int, int]]] = {}
    for word in words:
        for name, start, stop in _candidates(word, cased=cased):
            if name in found or len(found) < MAX_CANDIDATES:
                found.setdefault(name, []).append((start, _behind_possessive(query, stop)))
    return NamedQuery(query, found)


def _candidates(word: re.Match[str], *, cased: bool) -> list[tuple[str, int, int]]:
    text = word[0]
    if _UNSPACED.search(text):
        return [
            (normal_form(text[start:stop]), word.start() + start, word.start() + stop)
            for start in range(len(text) - 1)
            for stop in range(start + 2, min(start + _LONGEST_UNSPACED_NAME, len(text)) + 1)
        ]
    name = normal_form(text)
    upper = not text[0].islower()
    if len(text) < 2 or (cased and not upper) or (name in STOP_WORDS and not (upper and cased)):
        return []
    return [(name[:_MAX_NAME_CHARS], word.start(), word.end())]


def _behind_possessive(text: str, end: int) -> int:
    return end + 2 if text[end : end + 2] in {"'s", "\u2019s"} else end
