"""What a memory mentions, as keys by which memories are linked.

Whatever is rare in a cube ties two memories together: a name, a number, a word that few others
hold. What is rare only the catalog knows, so keys are made of all that could be, most telling
first; capitals help where a language has them and nothing depends on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from memos_vllm.domain.finding import AUTHOR_PREFIX
from memos_vllm.plaintext.names import author_and_text, author_names
from memos_vllm.plaintext.terms import MAX_WORD_CHARS, STOP_WORDS, UNSPACED, WORD, normal_form, stem

# Three fifths of the memories in conversations have no more words than that worth a key.
MAX_ENTITIES: Final = 12
# Of a long text, this much is looked at.
MAX_CHARS: Final = 8192


_RUN = re.compile(rf"(?P<unspaced>[{UNSPACED}]+)|(?P<word>{WORD}(?:['\u2019]{WORD})?)")
_ENDS_SENTENCE = re.compile(r"[.!?:\n\u2026\"\u201c(]\s*$")
_POSSESSIVE = re.compile(r"['\u2019].*$")
_KANA = re.compile("[\u30a1-\u30fc]{3,}")
_HAN = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]{2,6}")


def entities_of(text: str, *, author: str | None = None) -> tuple[str, ...]:
    """Keys of a memory: at most 12 things it mentions, and the names of who said it.

    The same text and author always give the same keys, in the same order, none twice, each at
    most 64 characters.
    """
    author, said = author_and_text(author, text)
    rated: dict[str, float] = {}
    for key, rating in _mentioned(said[:MAX_CHARS]):
        rated[key] = max(rating, rated.get(key, 0.0))
    best = sorted(rated, key=lambda key: -rated[key])[:MAX_ENTITIES]
    return (*best, *(AUTHOR_PREFIX + name for name in author_names(author)))


def _mentioned(text: str) -> Iterator[tuple[str, float]]:
    """Keys and how telling each may be: names, then numbers, then long words before short ones."""
    for match in _RUN.finditer(text):
        if match["unspaced"] is not None:
            run = match["unspaced"]
            yield from ((key[:MAX_WORD_CHARS], 1.5) for key in _KANA.findall(run))
            yield from ((key, 1.0 + len(key) / 10) for key in _HAN.findall(run))
            continue
        word = _POSSESSIVE.sub("", match["word"])
        key = normal_form(word)
        if len(key) < 3 or key in STOP_WORDS:
            continue
        length = min(len(key), 20) / 20
        if any(char.isdigit() for char in key):
            yield key[:MAX_WORD_CHARS], 1.0 + length
        elif word[0].isupper() and not _begins_sentence(text, match.start()):
            yield stem(key)[:MAX_WORD_CHARS], 2.0 + length
        else:
            yield stem(key)[:MAX_WORD_CHARS], length


def _begins_sentence(text: str, start: int) -> bool:
    before = text[max(0, start - 3) : start]
    return not before.strip() or _ENDS_SENTENCE.search(before) is not None
