"""Markdown: rendered to HTML and read as HTML, so that both treat hidden parts alike.

The parser is pulldown-cmark: linear time whatever the nesting, in a language without pointers
that go astray.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pyromark
from pyromark import Options

from memos_vllm.plaintext.ingest.cleaning import clean_line, clean_text
from memos_vllm.plaintext.ingest.decoding import decode_text
from memos_vllm.plaintext.ingest.document import IngestLimits, ParsedDocument
from memos_vllm.plaintext.ingest.read_html import read_page

_OPTIONS = (
    Options.ENABLE_TABLES
    | Options.ENABLE_STRIKETHROUGH
    | Options.ENABLE_TASKLISTS
    | Options.ENABLE_FOOTNOTES
)
_FENCES = {"---": ("---", "..."), "+++": ("+++",)}
_FRONT_MATTER_CHARS = 64 * 1024
_TITLE = re.compile(r"^title[ \t]*[:=](.*)$", re.M)
_FIELD = re.compile(r"""^[\w"'-][\w "'.-]*[:=]""", re.M)


def read(data: bytes, *, declared: str | None, limits: IngestLimits) -> ParsedDocument:
    """Markdown (CommonMark with tables, footnotes, task lists) as blocks.

    Front matter is kept out of the text; its title becomes the document's.

    Args:
        declared: the character set that came with the file.
    Raises:
        InvalidRequest: it is not text, or nested beyond reason.
    """
    source, title = _without_front_matter(clean_text(decode_text(data, declared=declared)))
    parsed = read_page(pyromark.html(source, options=_OPTIONS), is_page=False)
    return replace(parsed, title=title or parsed.title)


def _without_front_matter(source: str) -> tuple[str, str | None]:
    first, _, rest = source.partition("\n")
    ends = _FENCES.get(first.rstrip())
    if ends is None:
        return source, None
    position = 0
    for line in rest[:_FRONT_MATTER_CHARS].split("\n"):
        if line.rstrip() in ends:
            matter = rest[:position]
            # Without a field it is a rule, and text between rules.
            if matter.strip() and _FIELD.search(matter) is None:
                break
            match = _TITLE.search(matter)
            title = clean_line(match.group(1)).strip("\"'") if match else None
            return rest[position + len(line) :], title or None
        position += len(line) + 1
    return source, None
