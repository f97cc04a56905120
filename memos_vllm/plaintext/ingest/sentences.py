"""Where sentences start, in any language that marks their ends, by rules that are easy to read.

A cut inside a sentence does more harm than a missed one, so every doubt is settled against a cut.
Linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from memos_vllm.plaintext.ingest.abbreviations import (
    AT_BOTH_PLACES,
    BEFORE_NAMES,
    BEFORE_NUMBERS,
    MONTHS,
    OPENING_WORDS,
)

_CLOSERS = "\"'”’»›)\\]}」』】〉》）］｝〕"
_OPENERS = "\"'“‘„‚«‹([{¿¡「『【〈《（［｛〔*_#>–—-"
# They end a sentence wherever they stand; the first three of `_SOFT` need a blank behind them.
_HARD = "。！？｡．।॥։።፧။။។៕۔᙮᠃᠉⸮"
_SOFT = ".!?…؟‽‼⁇⁈⁉"
# Thai, Lao, Khmer and Burmese set a blank where others set a full stop.
_SPACED = "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff"

# Possessive, and only from the first mark of a run: a page of dots is walked once.
_CANDIDATE = re.compile(
    rf"(?P<hard>[{_HARD}][{_HARD}{_SOFT}]*+)[{_CLOSERS}]*+"
    rf"|(?<![{_SOFT}])(?P<soft>[{_SOFT}]++)(?P<close>[{_CLOSERS}]*+)(?:\[\d{{1,3}}\])*+(?=\s)"
    r"|(?P<line>\n)"
    rf"|(?P<blank>(?<=[{_SPACED}]) ++(?=[{_SPACED}]))"
)
_BLANKS = re.compile(r"\s*")
_HEAD = re.compile(rf"[{re.escape(_OPENERS)}\s]{{0,6}}([^\W_]+)?")
_TOKEN = re.compile(r"[^\s(\[{\"'“‘„«/–—]{1,32}\Z")
# Signs before the number of a list item.
_MARK_CHARS = 8
# A quotation that ended its own sentence, and goes on: 「…。」と言った
_JAPANESE_GOES_ON = "とってのはがをにでもかや、，,"


def sentence_starts(text: str) -> list[int]:
    """Offsets at which a sentence begins, ascending, without 0.

    Line feeds are ends of sentences too, unless a small letter follows: a reader that keeps one
    means it. What lies between two offsets, blanks and all, is one sentence.
    """
    starts: list[int] = []
    small_after_end = _begins_small(text)
    last = 0
    for match in _CANDIDATE.finditer(text):
        blank_end = _BLANKS.match(text, match.end())
        assert blank_end is not None
        start = blank_end.end()
        if start >= len(text):
            break
        if start > last and _ends(text, match, last, start, small_after_end=small_after_end):
            starts.append(start)
            last = start
    return starts


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`, without the blanks around them."""
    return [text[start:end].strip() for start, end in spans(text, sentence_starts(text))]


def spans(text: str, starts: list[int] | tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The stretches of `text` between the offsets in `starts`."""
    start = 0
    for end in starts:
        yield start, end
        start = end
    yield start, len(text)


def _begins_small(text: str) -> bool:
    """Whether the writer begins sentences with small letters, as many do in chat."""
    head = _HEAD.match(text)
    word = head.group(1) if head else None
    return word is not None and word[0].islower()


def _ends(text: str, match: re.Match[str], last: int, start: int, *, small_after_end: bool) -> bool:
    if match.lastgroup == "blank":
        return True
    word = _word_at(text, start)
    small = word[:1].islower()
    if match.lastgroup == "line":
        return not small or small_after_end
    if match.group("hard") is not None:
        return _hard_ends(text, match)
    if small and not small_after_end:
        return False
    mark = match.group("soft")
    if mark != "." or match.group("close"):
        # A mark that is quoted or bracketed, and goes on: "Why?" he asked.
        return not small or not match.group("close")
    return _full_stop_ends(text, match.start(), last, word, small=small)


def _word_at(text: str, start: int) -> str:
    head = _HEAD.match(text, start)
    return (head.group(1) or "") if head else ""


def _hard_ends(text: str, match: re.Match[str]) -> bool:
    end = match.end()
    if match.group("hard") == "．" and text[end : end + 1].isdigit():
        return False
    closed = end > match.end("hard")
    return not (closed and text[end : end + 1] in _JAPANESE_GOES_ON)


def _full_stop_ends(text: str, stop: int, last: int, word: str, *, small: bool) -> bool:
    match = _TOKEN.search(text, max(last, stop - 33), stop)
    if match is None:
        return True
    token = match.group()
    low = token.lower()
    if low.isdigit() and len(low) <= 3:
        # "1. First", and the German "am 3. Oktober".
        before = match.start()
        opens = before - last <= _MARK_CHARS and not text[last:before].strip(_OPENERS + " \n")
        return not opens and word.lower() not in MONTHS
    if low in BEFORE_NAMES or (low in BEFORE_NUMBERS and word[:1].isdigit()):
        return False
    is_initial = len(token) == 1 and token.isupper()
    if is_initial or low in AT_BOTH_PLACES or _is_acronym(low):
        # J. R. R. Tolkien, but "So did I. Then".
        opening = word.lower() in OPENING_WORDS and not small
        return opening and (not is_initial or token == "I")
    return True


def _is_acronym(low: str) -> bool:
    parts = low.split(".")
    return len(parts) > 1 and all(part.isalpha() and len(part) <= 2 for part in parts)
