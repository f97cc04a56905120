"""The flow of a page: inline text gathers, and becomes a block where a block ends."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from memos_vllm.plaintext.ingest import blocks
from memos_vllm.plaintext.ingest.document import Block, BlockKind
from memos_vllm.plaintext.ingest.tables import Cell, table_blocks

_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCK_TAGS = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "dir",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "header",
        "hgroup",
        "hr",
        "legend",
        "li",
        "main",
        "ol",
        "p",
        "section",
        "summary",
        "table",
        "tbody",
        "td",
        "tfoot",
        "th",
        "thead",
        "tr",
        "ul",
        "pre",
    ]
) | frozenset(_HEADINGS)
_AROUND = {"q": ('"', '"'), "del": ("~~", "~~"), "s": ("~~", "~~"), "strike": ("~~", "~~")}
_WHITE = re.compile(r"\s+")
_LINE_BREAK = "\n"


@dataclass(slots=True)
class _Table:
    """A table of facts that is open; `cell` gathers text while a cell is."""

    rows: list[list[Cell]] = field(default_factory=list)
    cell: list[str] | None = None
    shape: tuple[bool, int, int] = (False, 1, 1)
    nested: int = 0


class Flow:
    """Takes tags and text in the order of the document; `blocks` are what came of them."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._inline: list[str] = []
        self._heading_level = 0
        self._preformatted = 0
        # For each open list the number of its next item; None in a list without numbers.
        self._lists: list[int | None] = []
        self._mark = ""
        self._table: _Table | None = None
        self._layout_tables: list[bool] = []

    def text(self, text: str) -> None:
        """Inline text, its white space as in the source."""
        self._inline.append(text if self._preformatted else _WHITE.sub(" ", text))

    def enter(self, tag: str) -> None:
        """An element begins that needs nothing but its name."""
        if tag == "br":
            self._break()
        elif tag in _AROUND:
            self._inline.append(_AROUND[tag][0])
        elif tag in _BLOCK_TAGS:
            self.flush()
            self._enter_block(tag)

    def _enter_block(self, tag: str) -> None:
        if tag in _HEADINGS:
            self._heading_level = _HEADINGS[tag]
        elif tag == "pre":
            self._preformatted += 1
        elif tag in {"ul", "dir"}:
            self._lists.append(None)
        elif tag == "li":
            self._mark = self._next_mark()
        elif tag == "tr" and self._table is not None and not self._table.nested:
            self._table.rows.append([])

    def _next_mark(self) -> str:
        number = self._lists[-1] if self._lists else None
        if number is None:
            return "- "
        self._lists[-1] = number + 1
        return f"{number}. "

    def _break(self) -> None:
        # Two in a row are how people made paragraphs before they learned of <p>.
        while self._inline and self._inline[-1] == " ":
            self._inline.pop()
        if self._inline and self._inline[-1] == _LINE_BREAK and not self._preformatted:
            self.flush()
        else:
            self._inline.append(_LINE_BREAK)

    def mark(self, mark: str) -> None:
        """The next block of text is an item that begins with `mark`."""
        self.flush()
        self._mark = mark

    def enter_list(self, *, first: int) -> None:
        """A numbered list begins with `first`."""
        self.flush()
        self._lists.append(first)

    def enter_table(self, *, is_layout: bool) -> None:
        """A table begins; of a layout table only the text is kept, in its order."""
        self.flush()
        if self._table is not None:
            self._table.nested += 1
            return
        self._layout_tables.append(is_layout)
        if not is_layout:
            self._table = _Table()

    def enter_cell(self, *, is_header: bool, columns: int, rows: int) -> None:
        """A cell begins."""
        self.flush()
        table = self._table
        if table is None or table.nested:
            return
        table.cell, table.shape = [], (is_header, columns, rows)

    def leave(self, tag: str) -> None:
        """The element that was entered last and is still open ends."""
        if tag in _AROUND:
            self._inline.append(_AROUND[tag][1])
        elif tag in _BLOCK_TAGS:
            if tag == "dt":
                self._end_term()
            self.flush()
            self._leave_block(tag)

    def _end_term(self) -> None:
        term = "".join(self._inline).rstrip()
        if term[-1:].isalnum():
            self._inline = [term, ":"]

    def _leave_block(self, tag: str) -> None:
        if tag in _HEADINGS:
            self._heading_level = 0
        elif tag == "pre":
            self._preformatted -= 1
        elif tag in {"ul", "ol", "dir"}:
            self._lists.pop()
        elif tag == "li":
            self._mark = ""
        elif tag in {"td", "th"}:
            self._leave_cell()
        elif tag == "table":
            self._leave_table()

    def _leave_cell(self) -> None:
        table = self._table
        if table is None or table.nested or table.cell is None:
            return
        is_header, columns, rows = table.shape
        if not table.rows:
            table.rows.append([])
        text = " ".join(table.cell)
        table.rows[-1].append(Cell(text, columns=columns, rows=rows, is_header=is_header))
        table.cell = None

    def _leave_table(self) -> None:
        if self._table is not None and self._table.nested:
            self._table.nested -= 1
            return
        if not self._layout_tables.pop() and self._table is not None:
            self.blocks.extend(table_blocks(self._table.rows))
            self._table = None

    def flush(self) -> None:
        """End the block that is open."""
        text = "".join(self._inline)
        self._inline = []
        if not text.strip():
            return
        if self._table is not None and self._table.cell is not None:
            self._table.cell.append(text)
        elif self._heading_level:
            self.blocks.extend(blocks.heading(text, level=self._heading_level))
        elif self._preformatted:
            self.blocks.extend(blocks.code(text))
        elif self._mark:
            found = blocks.prose(self._mark + text.strip(), kind=BlockKind.LIST_ITEM)
            self._mark = ""
            self.blocks.extend(found)
        else:
            self.blocks.extend(blocks.prose(text))
