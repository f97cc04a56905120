"""Text to terms with weights: the word side of a search.

A document's weights hold BM25's saturation and length norm, a query's the counts; the index
multiplies by IDF over what the caller may see. Scripts that set no blanks between words become
pairs of characters. Only words of plain Latin letters are stemmed, by the English rules: words of
other languages change alike in texts and queries, so they still meet.
"""

from __future__ import annotations

import hashlib
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

import numpy as np
import snowballstemmer

from memos_vllm.plaintext.dates import date_terms
from memos_vllm.plaintext.index.base import SparseVector

# Terms of a paragraph, so that a turn of a chat and a chunk of a document stand to either side.
AVERAGE_TERMS: Final = 32
SATURATION: Final = 0.9
LENGTH_NORM: Final = 0.4
MAX_QUERY_TERMS: Final = 256
MAX_WORD_CHARS: Final = 64

STOP_WORDS: Final = frozenset(
    "a about above after again all also am an and any are as at be because been before being "
    "below between both but by can could did do does doing down during each few for from further "
    "had has have having he her here hers herself him himself his how i if in into is it its "
    "itself just me more most my myself no nor not of off on once only or other our ours out over "
    "own same she should so some such than that the their theirs them themselves then there these "
    "they this those through to too under until up very was we were what when where which while "
    "who whom whose why will with would you your yours yourself "
    "don't doesn't didn't isn't aren't wasn't weren't haven't hasn't hadn't won't wouldn't can't "
    "couldn't shouldn't i'm i've i'd i'll you're you've you'd you'll he'd he'll she'd she'll we're "
    "we've we'd we'll they're they've they'd they'll".split()
)

# Han, kana, Hangul, and the scripts of Thailand, Laos, Myanmar and Cambodia.
UNSPACED: Final = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
# Vowel signs and other marks inside words, which `\w` leaves out.
_MARKS = (
    "\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed"
    "\u0900-\u0963\u0971-\u0dff\u0f71-\u0f84"
)
WORD: Final = rf"(?:(?![{UNSPACED}])[\w{_MARKS}])+"
_RUN = re.compile(
    rf"(?P<unspaced>[{UNSPACED}]+)|(?P<number>\d+(?:[.,]\d+)+)|(?P<word>{WORD}(?:'{WORD})*)"
)
_ACCENTS = re.compile("(?<=[a-z])[\u0300-\u036f]+")
_POSSESSIVE = re.compile(r"'s?$")
_PARTS = re.compile(r"[^_]+")

_stemmer = threading.local()


def document_terms(text: str) -> SparseVector:
    """The terms of a memory, each weighted by BM25 without IDF."""
    counts = Counter(terms_of(text))
    if not counts:
        return SparseVector.empty()
    length = sum(counts.values()) / AVERAGE_TERMS
    norm = SATURATION * (1 - LENGTH_NORM + LENGTH_NORM * length)
    return _vector(
        {term: tf * (SATURATION + 1) / (tf + norm) for term, tf in counts.items()},
    )


def query_terms(text: str) -> SparseVector:
    """The terms of what is searched for and their counts; at most 256, the most frequent."""
    return _vector(dict(Counter(terms_of(text)).most_common(MAX_QUERY_TERMS)))


def terms_of(text: str) -> Iterator[str]:
    """The terms of `text` in order, with doubles; the terms of dates last."""
    plain = normal_form(text)
    for match in _RUN.finditer(plain):
        if match["word"] is not None:
            yield from _word_terms(match["word"])
        elif match["number"] is not None:
            yield match["number"].replace(",", "")[:MAX_WORD_CHARS]
        else:
            yield from _pairs(match["unspaced"])
    yield from date_terms(plain)


def normal_form(text: str) -> str:
    """`text` without case, width, typographic apostrophes, and accents on Latin letters."""
    plain = text.casefold()
    if plain.isascii():
        return plain
    plain = unicodedata.normalize("NFKC", plain).casefold().replace("\u2019", "'")
    decomposed = _ACCENTS.sub("", unicodedata.normalize("NFD", plain))
    return unicodedata.normalize("NFC", decomposed)


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """The stem of a word in normal form, by the English rules if it is plain Latin letters."""
    if not (word.isascii() and word.isalpha()):
        return word
    stemmer = getattr(_stemmer, "english", None)
    if stemmer is None:
        # A stemmer keeps the word it works at, so each thread has its own.
        stemmer = _stemmer.english = snowballstemmer.stemmer("english")
    stemmed: str = stemmer.stemWord(word)
    return stemmed


def _word_terms(word: str) -> Iterator[str]:
    word = _POSSESSIVE.sub("", word)[:MAX_WORD_CHARS]
    if word in STOP_WORDS:
        return
    if "_" in word:
        # Names in code: found whole and by each part.
        parts = _PARTS.findall(word)
        if len(parts) > 1:
            yield word
        yield from (stem(part) for part in parts if part not in STOP_WORDS)
    elif word:
        yield stem(word)


def _pairs(run: str) -> Iterator[str]:
    if len(run) == 1:
        yield run
    for start in range(len(run) - 1):
        yield run[start : start + 2]


@lru_cache(maxsize=1 << 16)
def _number(term: str) -> int:
    """32 bits that stand for a term; of a million terms, some hundred pairs fall together."""
    digest = hashlib.blake2b(term.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _vector(weights: dict[str, float]) -> SparseVector:
    """Sums the weights of terms that share a number."""
    summed: dict[int, float] = {}
    for term, weight in weights.items():
        number = _number(term)
        summed[number] = summed.get(number, 0.0) + weight
    indices = np.fromiter(summed.keys(), np.uint32, len(summed))
    return SparseVector(indices, np.fromiter(summed.values(), np.float32, len(summed)))
