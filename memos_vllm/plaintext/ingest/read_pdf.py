"""PDF: the text of its pages, with page numbers, and headings where the outline names them.

pypdf draws nothing and follows nothing: pictures, scripts, attachments and forms stay shut.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import logging
import math
import pkgutil
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import pypdf
from pypdf.errors import DependencyError, PyPdfError

from memos_vllm.errors import InvalidRequest, TooLarge
from memos_vllm.plaintext.ingest.cleaning import clean_line
from memos_vllm.plaintext.ingest.document import IngestLimits, ParsedDocument
from memos_vllm.plaintext.ingest.pdf_layout import (
    Headings,
    Page,
    Sizes,
    headings_by_size,
    paragraphs,
    running_lines,
)

Matrix: TypeAlias = Sequence[float]

_LIGATURES = str.maketrans(
    {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"}
)
# Fonts without a table of characters give these for every glyph.
_NO_CHARACTER = re.compile("[\ufffd\ue000-\uf8ff\U000f0000-\U0010ffff]+")
_GIBBERISH_SHARE = 0.3
_MAX_OUTLINE = 10_000
_NAMED_BY_A_PROGRAM = re.compile(
    r"Microsoft \w+ - |\(?(?:untitled|anonymous)|document\d*$|\S+\.(?:docx?|indd|tex|dvi)$",
    re.IGNORECASE,
)
_NOT_WORD = re.compile(r"[\W_]+")


# What Python and pypdf load on first use; by then the worker can open no file.
_CODECS = (
    *("utf-16", "utf-16-be", "utf-16-le", "charmap", "latin-1", "cp1252", "mac-roman"),
    *("gbk", "gb18030", "cp950", "cp932", "cp1250", "cp1254", "cp1257"),
)


def _load_everything() -> None:
    for name in _CODECS:
        codecs.lookup(name)
    for module in pkgutil.walk_packages(pypdf.__path__, "pypdf."):
        # Parts that need packages which are not installed, or hidden, are not used either.
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name)


_load_everything()


def read(data: bytes, *, declared: str | None, limits: IngestLimits) -> ParsedDocument:
    """A PDF as paragraphs with page numbers.

    Raises:
        InvalidRequest: locked by a password, broken, or without text.
        TooLarge: more pages than `limits` allow.
    """
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = pypdf.PdfReader(io.BytesIO(data), strict=False)
        _unlock(reader)
        num_pages = len(reader.pages)
    except (PyPdfError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise _broken("its page table cannot be read") from error
    if num_pages == 0:
        raise _broken("it holds no pages")
    if num_pages > limits.max_pages:
        raise TooLarge(
            f"the PDF has {num_pages} pages and the limit is {limits.max_pages}; split it"
        )
    read_pages = [_page_lines(reader, index) for index in range(num_pages)]
    _check_characters([page for page, _ in read_pages])
    pages, sizes = _without_running_lines(read_pages)
    headings = _outline_headings(reader, pages) or headings_by_size(pages, sizes)
    blocks = paragraphs(pages, headings)
    silent = [index + 1 for index, page in enumerate(pages) if not any(page)]
    return ParsedDocument(
        title=_title(reader), blocks=tuple(blocks), notes=tuple(_notes(silent, num_pages))
    )


def _unlock(reader: pypdf.PdfReader) -> None:
    """Open what has an empty password, as viewers do: such files forbid, but do not hide."""
    if not reader.is_encrypted:
        return
    try:
        opened = bool(reader.decrypt(""))
    except DependencyError:
        raise InvalidRequest(
            "the PDF is encrypted in a way that this server cannot open (it lacks the package "
            "'cryptography'); save it without encryption",
            param="file",
        ) from None
    except NotImplementedError:
        opened = False
    if not opened:
        raise InvalidRequest(
            "the PDF is locked by a password; remove the password and send it again",
            param="file",
        )


def _broken(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"the PDF is broken: {reason}; open it in a viewer and print or export it to a new PDF",
        param="file",
    )


def _page_lines(reader: pypdf.PdfReader, index: int) -> tuple[Page, Sizes]:
    """The lines of a page as drawn, and the height of their letters."""
    fragments: list[tuple[str, float]] = []

    def note(text: str, cm: Matrix, tm: Matrix, _font: object, font_size: float) -> None:
        if text:
            scale = math.hypot(cm[2], cm[3]) * math.hypot(tm[2], tm[3])
            fragments.append((text, round(2 * abs(font_size) * scale) / 2))

    try:
        text = reader.pages[index].extract_text(visitor_text=note)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        # pypdf meets broken objects with whatever Python raises on them.
        raise _broken(f"page {index + 1} cannot be read") from error
    lines = text.split("\n")
    if "".join(fragment for fragment, _ in fragments) != text:
        return lines, [0.0] * len(lines)
    return lines, _line_sizes(fragments, len(lines))


def _line_sizes(fragments: Sequence[tuple[str, float]], num_lines: int) -> Sizes:
    """The size in which most letters of each line are drawn."""
    weights: list[Counter[float]] = [Counter() for _ in range(num_lines)]
    line = 0
    for text, size in fragments:
        for offset, part in enumerate(text.split("\n")):
            line += offset > 0
            weights[line][size] += len(part.strip())
    return [counter.most_common(1)[0][0] if counter else 0.0 for counter in weights]


def _without_running_lines(
    read_pages: Sequence[tuple[Page, Sizes]],
) -> tuple[list[Page], list[Sizes]]:
    pages = [[_clean(line) for line in page] for page, _ in read_pages]
    dropped = running_lines(pages)
    kept = [
        [
            (line, size)
            for j, (line, size) in enumerate(zip(page, sizes, strict=True))
            if (i, j) not in dropped
        ]
        for i, (page, (_, sizes)) in enumerate(zip(pages, read_pages, strict=True))
    ]
    return [[line for line, _ in page] for page in kept], [
        [size for _, size in page] for page in kept
    ]


def _clean(line: str) -> str:
    return clean_line(_NO_CHARACTER.sub(" ", line.translate(_LIGATURES)))


def _check_characters(pages: Sequence[Page]) -> None:
    text = "".join(line for page in pages for line in page)
    num_bad = sum(len(run) for run in _NO_CHARACTER.findall(text))
    num_words = sum(character.isalnum() for character in text)
    if num_words == 0 and num_bad == 0:
        raise InvalidRequest(
            "the PDF has no text: its pages are pictures, as scanners make them; run OCR "
            "(text recognition) on it first",
            param="file",
        )
    if num_bad > _GIBBERISH_SHARE * (num_words + num_bad):
        raise InvalidRequest(
            "the PDF's fonts do not say which characters they draw, so its text cannot be read; "
            "run OCR (text recognition) on it first",
            param="file",
        )


def _notes(silent: Sequence[int], num_pages: int) -> Iterator[str]:
    if silent:
        listed = ", ".join(map(str, silent[:10])) + (" and more" if len(silent) > 10 else "")
        yield (
            f"{len(silent)} of {num_pages} pages hold no text (page {listed}); if they are scans, "
            "run OCR and send the document again"
        )


def _title(reader: pypdf.PdfReader) -> str | None:
    try:
        metadata = reader.metadata
        title = metadata.title if metadata is not None else None
    except (PyPdfError, ValueError, TypeError, KeyError, AttributeError):
        return None
    line = clean_line(title) if isinstance(title, str) else ""
    return line if line and not _NAMED_BY_A_PROGRAM.match(line) else None


def _outline_headings(reader: pypdf.PdfReader, pages: Sequence[Page]) -> Headings:
    """The lines that the outline names, by page and line; empty when it is broken."""
    found: Headings = {}
    try:
        page_of = {
            page.indirect_reference.idnum: index
            for index, page in enumerate(reader.pages)
            if page.indirect_reference is not None
        }
        entries = list(_outline_entries(reader.outline))
    except (PyPdfError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return found
    for title, level, page_id in entries:
        index = page_of.get(page_id)
        if index is None or index >= len(pages):
            continue
        lines = found.get(index, {})
        wanted = _NOT_WORD.sub("", title).lower()
        for line_index, line in enumerate(pages[index]):
            if wanted and line_index not in lines and _NOT_WORD.sub("", line).lower() == wanted:
                found[index] = {**lines, line_index: level}
                break
    return found


def _outline_entries(outline: Any) -> Iterator[tuple[str, int, int]]:
    """(title, level, object number of the page) of every entry, in order."""
    stack: list[tuple[Any, int]] = [(iter(outline), 1)]
    seen = 0
    while stack:
        entries, level = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
        elif isinstance(entry, list):
            stack.append((iter(entry), level + 1))
        else:
            seen += 1
            if seen > _MAX_OUTLINE:
                return
            number = getattr(entry.page, "idnum", None)
            if isinstance(entry.title, str) and isinstance(number, int):
                yield entry.title, level, number
