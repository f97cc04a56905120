"""From lines on pages to paragraphs: a PDF knows where ink goes, and nothing of sentences."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from memos_vllm.plaintext.ingest import blocks
from memos_vllm.plaintext.ingest.document import Block, BlockKind
from memos_vllm.plaintext.ingest.read_text import LIST_MARK, join_mark
from memos_vllm.plaintext.ingest.sentences import sentence_starts

# Lines of one page in reading order; an empty one is a gap.
Page = list[str]
# The height of each line's letters, in the units of the page; 0 where unknown.
Sizes = list[float]
# For each page (from 0) the level of the heading that a line is, by its index.
Headings = dict[int, dict[int, int]]

# A header or footer stands in the first or last lines of a page, on most pages.
_EDGE_LINES = 2
_LEAST_PAGES = 4
_REPEATED_SHARE = 0.6
# Left and right pages often have headers of their own.
_REPEATED_SHARE_ONE_SIDE = 0.4
_PAGE_NUMBER_CHARS = 40
_NUMBER = re.compile(r"\d+")
_BARE_PAGE_NUMBER = re.compile(
    r"\W*(?:page|seite|página|pagina|p\.?|стр\.?)?\W*#(?:\D{1,6}#)?\W*", re.I
)

# Letters of a heading are this much larger than those of the text, and headings are a small part.
_HEADING_SCALE = 1.15
_HEADING_SHARE = 0.2
_HEADING_LEVELS = 4
_HEADING_CHARS = 150
_WRAPPED_CHARS = 30

_ENDS_SENTENCE = re.compile(r"[.!?:。！？…;][\"'”’»)\]]*\Z")
_HYPHEN = re.compile(r"[^\W\d_]{2,40}[-‐]\Z")
_WORD = re.compile(r"[^\W\d_]+(?:[-‐][^\W\d_]+)*")


def running_lines(pages: Sequence[Page]) -> set[tuple[int, int]]:
    """Headers, footers and page numbers, as (page, line) from 0.

    A line is one when it stands at the same edge of most pages, word for word, or with one number
    that counts the pages. The first copy of one with words is not: it may be the only title. What
    differs in anything else, such as a total at the foot of an invoice, is not either.
    """
    found: set[tuple[int, int]] = set()
    if len(pages) < _LEAST_PAGES:
        return found
    groups: dict[tuple[bool, str], list[tuple[int, int]]] = defaultdict(list)
    for page_index, page in enumerate(pages):
        for is_top, line_index in _edges(page):
            shape = _NUMBER.sub("#", page[line_index])
            groups[is_top, shape].append((page_index, line_index))
    for (_, shape), places in groups.items():
        if _is_running(places, pages):
            is_number = len(shape) <= _PAGE_NUMBER_CHARS and _BARE_PAGE_NUMBER.fullmatch(shape)
            found.update(places if is_number else places[1:])
    return found


def _edges(page: Page) -> Iterator[tuple[bool, int]]:
    """(is at the top, index) of the lines with text nearest to both edges."""
    filled = [index for index, line in enumerate(page) if line]
    # A page of four lines is all edge; half of it is looked at from each side.
    reach = min(_EDGE_LINES, (len(filled) + 1) // 2)
    yield from ((True, index) for index in filled[:reach])
    yield from ((False, index) for index in filled[len(filled) - min(reach, len(filled) // 2) :])


def _is_running(places: Sequence[tuple[int, int]], pages: Sequence[Page]) -> bool:
    on_pages = sorted({page for page, _ in places})
    share = len(on_pages) / len(pages)
    one_side = len({page % 2 for page in on_pages}) == 1
    if share < (_REPEATED_SHARE_ONE_SIDE if one_side else _REPEATED_SHARE):
        return False
    numbers = [[int(n[:18]) for n in _NUMBER.findall(pages[page][line])] for page, line in places]
    for column in zip(*numbers, strict=False):
        if len(set(column)) == 1:
            continue
        offsets = Counter(n - page for n, (page, _) in zip(column, places, strict=True))
        if offsets.most_common(1)[0][1] < 0.8 * len(places):
            return False
    return True


def headings_by_size(pages: Sequence[Page], sizes: Sequence[Sizes]) -> Headings:
    """Lines in letters clearly larger than the text's, when they are few and short.

    The largest size is level 1. A heading over several lines becomes one line of `pages`, and the
    others become empty.
    """
    weights: Counter[float] = Counter()
    for page, page_sizes in zip(pages, sizes, strict=True):
        for line, size in zip(page, page_sizes, strict=True):
            weights[size] += len(line)
    if not weights or weights.most_common(1)[0][0] == 0:
        return {}
    body = weights.most_common(1)[0][0]
    large = sorted((size for size in weights if size >= _HEADING_SCALE * body), reverse=True)
    if sum(weights[size] for size in large) > _HEADING_SHARE * sum(weights.values()):
        return {}
    levels = {size: min(rank, _HEADING_LEVELS) for rank, size in enumerate(large, start=1)}
    return {
        index: _page_headings(page, page_sizes, levels)
        for index, (page, page_sizes) in enumerate(zip(pages, sizes, strict=True))
    }


def _page_headings(page: Page, sizes: Sizes, levels: Mapping[float, int]) -> dict[int, int]:
    found: dict[int, int] = {}
    first = -1
    for index, (line, size) in enumerate(zip(page, sizes, strict=True)):
        level = levels.get(size) if line else None
        if level is None or not any(character.isalpha() for character in line):
            first = -1
        elif first >= 0 and sizes[first] == size and _wraps(page[first], line):
            page[first] += join_mark(page[first], line) + line
            page[index] = ""
        else:
            first = index
            found[index] = level
    return {index: level for index, level in found.items() if len(page[index]) <= _HEADING_CHARS}


@dataclass(slots=True)
class _Open:
    """The paragraph that is being put together."""

    page: int
    pieces: list[str] = field(default_factory=list)
    length: int = 0
    turns: list[tuple[int, int]] = field(default_factory=list)

    def add(self, piece: str) -> None:
        self.pieces.append(piece)
        self.length += len(piece)

    def block(self) -> Block:
        text = "".join(self.pieces)
        kind = BlockKind.LIST_ITEM if LIST_MARK.match(text) else BlockKind.PARAGRAPH
        return Block(
            kind,
            text,
            page=self.page,
            cuts=tuple(sentence_starts(text)),
            turns=tuple(self.turns),
        )


def _wraps(heading: str, line: str) -> bool:
    """Whether a line goes on with the heading above it: one that is short had room for it."""
    is_long = len(heading) >= _WRAPPED_CHARS
    return len(heading) <= _HEADING_CHARS and (is_long or line[:1].islower())


def paragraphs(pages: Sequence[Page], headings: Headings) -> list[Block]:
    """Blocks of the pages; a paragraph may run over the end of a page.

    Args:
        headings: the lines that are headings, as the outline of the document tells.
    """
    words = _vocabulary(pages)
    found: list[Block] = []
    current: _Open | None = None
    last = ""
    width = 0
    for index, page in enumerate(pages):
        number = index + 1
        width = _width(page) or width
        for line_index in _filled_range(page):
            line = page[line_index]
            level = headings.get(index, {}).get(line_index)
            if current is not None and (level or _breaks(last, line, width)):
                found.append(current.block())
                current = None
            if level:
                found.extend(blocks.heading(line, level=level, page=number))
            elif line:
                current = _append(current, last, line, number, words)
            last = line
    if current is not None:
        found.append(current.block())
    return found


def _filled_range(page: Page) -> range:
    """Gaps at the edges of a page are no gaps of the text."""
    filled = [index for index, line in enumerate(page) if line]
    return range(filled[0], filled[-1] + 1) if filled else range(0)


def _append(current: _Open | None, last: str, line: str, page: int, words: Counter[str]) -> _Open:
    if current is None:
        current = _Open(page)
    else:
        _join(current, last, line, words)
        at = current.turns[-1][1] if current.turns else current.page
        if page != at:
            current.turns.append((current.length, page))
    current.add(line)
    return current


def _join(current: _Open, last: str, line: str, words: Counter[str]) -> None:
    """Put what belongs between two lines: a blank, nothing, or one hyphen less."""
    match = _HYPHEN.search(last, max(len(last) - 41, 0))
    if match is None or not line[:1].islower():
        current.add(join_mark(last, line))
        return
    head = match.group()
    rest = _WORD.match(line)
    joined = (head[:-1] + (rest.group() if rest else "")).lower()
    with_hyphen = (head[:-1] + "-" + (rest.group() if rest else "")).lower()
    if words[joined] or not words[with_hyphen]:
        piece = current.pieces.pop()
        current.length -= 1
        current.pieces.append(piece[:-1])


def _vocabulary(pages: Sequence[Page]) -> Counter[str]:
    """Words as they stand inside lines; the halves at line ends count as halves."""
    words: Counter[str] = Counter()
    for page in pages:
        for line in page:
            words.update(word.lower().replace("‐", "-") for word in _WORD.findall(line))
    return words


def _width(page: Page) -> int:
    """Characters in a full line: nine lines in ten are not longer."""
    lengths = sorted(len(line) for line in page if line)
    return lengths[min(len(lengths) - 1, len(lengths) * 9 // 10)] if lengths else 0


def _breaks(last: str, line: str, width: int) -> bool:
    """Whether a paragraph ends between two lines."""
    if not line:
        return True
    if LIST_MARK.match(line):
        return not line[:1].isalnum() or len(last) < 0.85 * width or bool(LIST_MARK.match(last))
    if _ENDS_SENTENCE.search(last):
        return len(last) < 0.85 * width
    return len(last) < 0.5 * width and not line[:1].islower() and last[-1:] not in ",-‐("
